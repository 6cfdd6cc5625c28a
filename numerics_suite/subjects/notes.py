"""Notes on a subject for the user before it runs, which are not defects."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from numerics_suite.core.text import listed
from numerics_suite.subjects.files import StoredTensor, read_tensor

_LAYER = re.compile(r"^(?P<prefix>.*?layers\.(?P<index>\d+)\.)")
_COMPUTED = re.compile(r"(inv_freq|position_ids|masked_bias|attn\.bias)$")
"""Buffers of older checkpoints that each release computes, so that saving loses nothing."""


def checkpoint_notes(
    stored: Mapping[str, StoredTensor], config: Mapping[str, Any], model_class: str | None
) -> Iterator[str]:
    """Stored tensors that the release leaves out by design, which a save then loses.

    Args:
        stored: names in the files.
        config: raw `config.json`.
        model_class: the class of transformers that a load builds.
    """
    import transformers  # heavy

    ignored = ignored_by_design(stored, getattr(transformers, model_class or "", None))
    left = [name for name in ignored if not _COMPUTED.search(name) and not _has_a_place(name, config)]
    if left:
        count = "1 stored tensor" if len(left) == 1 else f"{len(left)} stored tensors"
        verb = "is" if len(left) == 1 else "are"
        groups = listed(tuple(dict.fromkeys(_group(name) for name in left)), 3)
        yield f"{count} ({groups}) {verb} not loaded by this release and {verb} lost on save"


def adapter_notes(folder: Path, held: Iterable[str]) -> Iterator[str]:
    """Whether a LoRA still has peft's initial values, which add nothing to the base.

    Args:
        folder: of the adapter.
        held: names of its tensors.
    """
    names = [name for name in held if "lora_B" in name]
    if names and not any(bool(read_tensor(folder, name).any()) for name in names):
        yield f"every lora_B ({len(names)}) is zero: this adapter was never trained and changes nothing of its base"


def ignored_by_design(names: Iterable[str], built: type | None) -> tuple[str, ...]:
    """The names that the class, or its body's class, declares to ignore on load.

    Up to 4.57 the pattern of GLM-4.5 stands in the class of the body, and a load of the whole model warns all the same.

    Args:
        names: of stored tensors.
        built: a class of transformers or of a checkpoint's own code, None where it is not known.
    """
    beside = vars(sys.modules[built.__module__]).values() if built is not None else ()
    classes = [built, *(each for each in beside if isinstance(each, type))]
    patterns = {
        pattern for each in classes for pattern in getattr(each, "_keys_to_ignore_on_load_unexpected", None) or ()
    }
    return tuple(name for name in names if any(re.search(pattern, name) for pattern in patterns))


def _has_a_place(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the layer of that name is one that the model has: the pattern names the last layer of one size, an inner one of another."""
    found = _LAYER.match(name)
    inner = config.get("text_config")
    sizes = inner if isinstance(inner, Mapping) and "num_hidden_layers" in inner else config
    layers = sizes.get("num_hidden_layers", sizes.get("num_layers"))
    return found is not None and isinstance(layers, int) and int(found["index"]) < layers


def _group(name: str) -> str:
    found = _LAYER.match(name)
    return f"{found['prefix']}*" if found else f"{name.partition('.')[0]}.*"
