"""Changed copies of the shipped checkpoints: the article's defects that live in a checkpoint's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from numerics_suite.subjects.fixtures import fixture_path

Tensors = dict[str, torch.Tensor]

WEIGHT = "model.layers.1.mlp.down_proj.weight"
"""The weight of `glm-tiny` that defects are put into."""

ROPE = {"rope_type": "default", "rope_theta": 50000.0, "partial_rotary_factor": 0.5}
"""How 5.x writes the rotary section."""

FIVE = {
    "config": {"rope_parameters": ROPE, "dtype": "bfloat16"},
    "drop": ("rope_theta", "partial_rotary_factor", "torch_dtype"),
}
"""What makes the layout of 5.x of a config in that of 4.x."""

NOBODY_INITIALISES = ('if getattr(module, "legacy_uninitialised", False):', "if True:")
"""Of `modeling_chatglm.py`: an `_init_weights` that returns at once."""


def changed(
    folder: Path,
    name: str,
    *,
    config: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    tensors: Callable[[Tensors], object] | None = None,
    code: tuple[str, str] | None = None,
) -> Path:
    """A changed copy of a shipped checkpoint.

    Args:
        folder: the copy; its name must be its own, since transformers keeps remote code in memory by the folder's name.
        name: of the fixture.
        config: keys of `config.json` to set.
        drop: keys to leave out.
        tensors: changes the weights in place.
        code: text of `modeling_chatglm.py`, and what stands there afterwards.
    """
    shutil.copytree(fixture_path(name), folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf-8")) | (config or {})
    (folder / "config.json").write_text(
        json.dumps({key: value for key, value in written.items() if key not in drop}), encoding="utf-8"
    )
    if tensors is not None:
        held = load_file(folder / "model.safetensors")
        tensors(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    if code is not None:
        source = (folder / "modeling_chatglm.py").read_text(encoding="utf-8")
        assert source.count(code[0]) == 1
        (folder / "modeling_chatglm.py").write_text(source.replace(*code), encoding="utf-8")
    return folder


def spoiled(value: float) -> Callable[[Tensors], object]:
    """One element of :data:`WEIGHT` is that value."""

    def spoil(held: Tensors) -> None:
        held[WEIGHT][2, 7] = value

    return spoil


def without_weight(held: Tensors) -> None:
    """:data:`WEIGHT` is missing."""
    held.pop(WEIGHT)


def with_homeless_tensor(held: Tensors) -> None:
    """A tensor that no weight is called after."""
    held["model.layers.1.mlp.down.weight"] = held[WEIGHT].clone()


def with_renamed_trunk(held: Tensors) -> None:
    """Every tensor of the trunk under another name."""
    for name in [name for name in held if name.startswith("model.")]:
        held[f"language_model.{name}"] = held.pop(name)
