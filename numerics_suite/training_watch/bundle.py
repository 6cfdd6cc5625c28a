"""A caught step as a folder: what was found, the batches and random states to run it again, and a script that does.

No pickle: JSON and safetensors. The folder appears whole or not at all, and never over another one.
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from numerics_suite.core.findings import finding_to_json
from numerics_suite.core.numbers import jsonable
from numerics_suite.core.records import Finding
from numerics_suite.diagnosis.update_remedies import checkpointing_of
from numerics_suite.engine import kept_step, reproduce_step
from numerics_suite.engine.digests import tensor_digest
from numerics_suite.engine.environment import describe_environment
from numerics_suite.subjects.files import sha256_of
from numerics_suite.training_watch.alarms import Alarm, Reading
from numerics_suite.training_watch.caught_step import Start, usual_dtype
from numerics_suite.training_watch.diagnosis import CaughtContext
from numerics_suite.training_watch.divergence import LOSS_NOW
from numerics_suite.training_watch.frozen_parameters import FROZEN
from numerics_suite.training_watch.norms import local
from numerics_suite.training_watch.ring import ForwardCall
from numerics_suite.training_watch.snapshots import SMALL_BYTES

KIND = "numerics-suite watch bundle"
SCHEMA_VERSION = 1
JSON_NAME, SCRIPT_NAME = "bundle.json", "reproduce.py"
BATCHES, PARAMETERS, OPTIMIZER = "batches.safetensors", "parameters.safetensors", "optimizer.safetensors"
BUFFERS, GRADIENTS = "buffers.safetensors", "gradients.safetensors"
SCRIPTS = {SCRIPT_NAME: reproduce_step, "kept_step.py": kept_step}
"""Modules of this package that a bundle carries, so that it runs without it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caught:
    """What a bundle holds beside the finding.

    Attributes:
        calls: of the ring, oldest first.
        kind: of the alarm, which says what shows it again.
        readings: the last figures.
        warnings: early warnings that came before.
        settings: of the watch.
    """

    calls: Sequence[ForwardCall]
    kind: str = ""
    readings: Sequence[Reading] = ()
    warnings: Sequence[Alarm] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)


def write_bundle(target: Path, finding: Finding, scene: CaughtContext, caught: Caught) -> Path:
    """Write the folder and say which it became: with `-2`, `-3`, … added where something is already.

    Raises:
        OSError: it cannot be written; then nothing of it is left.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name[:100]}.", dir=target.parent))
    try:
        unfinished.chmod(0o755)
        _fill(unfinished, finding, scene, caught)
        return _move(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _move(unfinished: Path, target: Path) -> Path:
    for count in range(1, 1000):
        place = target if count == 1 else target.with_name(f"{target.name}-{count}")
        try:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()
            if not place.exists():
                unfinished.rename(place)
                return place
        except FileExistsError:
            continue  # another process was quicker
    message = f"{target} and 998 names after it are taken"
    raise OSError(message)


def _fill(folder: Path, finding: Finding, scene: CaughtContext, caught: Caught) -> None:
    tensors: dict[str, Tensor] = {}
    calls = [_call_to_json(call, index, tensors) for index, call in enumerate(caught.calls)]
    save_file(tensors, folder / BATCHES)
    written, parameters, start = _parameters(scene, finding)
    if parameters:
        save_file(parameters, folder / PARAMETERS)
    loop, states = start.loop if start is not None else None, dict[str, Tensor]()
    stepped = loop.to_json(states) if loop is not None else None
    if states:
        save_file(states, folder / OPTIMIZER)
    small = {BUFFERS: _buffers(scene), GRADIENTS: _left_over(scene, finding) if caught.kind == FROZEN else {}}
    for name, values in small.items():
        if values:
            save_file(values, folder / name)
    for name, module in SCRIPTS.items():
        text = inspect.getsource(module)
        (folder / name).write_text(text.replace(kept_step.__name__, "kept_step"), encoding="utf-8")
    content = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "created_at": datetime.now(tz=timezone.utc).isoformat(timespec="seconds"),
        "environment": describe_environment(str(next((p.device for p in scene.model.parameters()), "cpu"))),
        "step": finding.step,
        "alarm": caught.kind,
        "finding": {**finding_to_json(finding), "reproducer": SCRIPT_NAME},
        "replay": _what_can_be_replayed(written, start, finding.step or 0),
        "settings": jsonable(caught.settings),
        "model": _model_to_json(scene),
        "parameters_are": written,
        "loss_scale": jsonable(scene.scale),
        "loop": stepped,
        "unheld": [] if start is None else list(start.unheld),
        "digests": {"parameters": _digest(dict(scene.model.named_parameters())), "optimizer": _digest(_state(scene))},
        "calls": calls,
        "warnings": [jsonable(asdict(alarm)) for alarm in caught.warnings],
        "readings": [jsonable(asdict(reading)) for reading in caught.readings],
        "files": {path.name: f"sha256:{sha256_of(path)}" for path in sorted(folder.iterdir())},
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / JSON_NAME).write_text(text, encoding="utf-8")
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner alone
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _parameters(scene: CaughtContext, finding: Finding) -> tuple[str | None, dict[str, Tensor], Start | None]:
    """Which parameters are written, in words, they, and the start of a replay that they are for."""
    named = {name: local(p.detach()) for name, p in scene.model.named_parameters()}
    small = sum(p.numel() * p.element_size() for p in named.values()) <= SMALL_BYTES
    # An older state is of use where the step goes bad from there again: what the script itself wrote into the model since then it lacks.
    for start in sorted(scene.starts, key=lambda start: bool(start.parameters) and not _shows(start, finding)):
        if start.parameters:
            words = f"snapshot from before step {scene.snapshot_step}"
            return words, {name: _stored(value) for name, value in start.parameters.items()}, start
        if small and start.backward:
            return "those of the bad step", {name: _stored(p) for name, p in named.items()}, start
    if scene.snapshot:  # of a model that processes share
        words = f"snapshot from before step {scene.snapshot_step}"
        return words, {name: _stored(local(value)) for name, value in scene.snapshot.items()}, None
    if scene.updated or not scene.replay or not small:
        return None, {}, None
    return "those of the bad step", {name: _stored(p) for name, p in named.items()}, None


def _shows(start: Start, finding: Finding) -> bool:
    """Whether the finding came about again from there."""
    replay = str(finding.evidence.get("replay", ""))
    return LOSS_NOW in finding.evidence or (start.words in replay and "stayed finite" not in replay)


def _what_can_be_replayed(written: str | None, start: Start | None, step: int) -> str:
    if not written:
        return "the forward pass only, with parameters that you give: no snapshot was kept (snapshot_every)"
    what = f"with the parameters in {PARAMETERS} ({written})"
    if start is None or start.loop is None:
        return f"forward and backward pass, {what}"
    first = start.first
    if first == step:
        return f"step {step}, {what}"
    gap = "" if start.whole else f"; the steps before {first} had left the ring"
    return f"steps {first} to {step}, {what}{gap}"


def _model_to_json(scene: CaughtContext) -> dict[str, Any]:
    model = scene.model
    config = getattr(model, "config", None)
    written = None if config is None or not hasattr(config, "to_dict") else jsonable(config.to_dict())
    dtypes = [str(p.dtype).removeprefix("torch.") for p in model.parameters()]
    return {
        "class": type(model).__name__,
        "module": type(model).__module__,
        "config": written,
        "adapter": _adapter_to_json(model),
        "attn": getattr(config, "_attn_implementation", None),
        "dtype": max(set(dtypes), key=dtypes.count) if dtypes else None,
        "trained_dtype": usual_dtype(p for p in model.parameters() if p.requires_grad),
        "training": model.training,
        "trained": sum(p.requires_grad for p in model.parameters()),
        "trained_names": [name for name, p in model.named_parameters() if p.requires_grad],
        "checkpointing": _checkpointing(model),
        "inputs_require_grads": any("require_grad" in hook.__qualname__ for hook in _hooks_of_embedding(model)),
    }


def _checkpointing(model: Any) -> dict[str, Any] | None:
    """How transformers' modules recompute their forward passes, None where none does."""
    ways = [function.keywords for module in model.modules() if (function := checkpointing_of(module)) is not None]
    return jsonable({key: value for key, value in ways[0].items() if isinstance(value, bool)}) if ways else None


def _hooks_of_embedding(model: Any) -> list[Any]:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    return [hook for hook in getattr(embedding, "_forward_hooks", {}).values() if hasattr(hook, "__qualname__")]


def _buffers(scene: CaughtContext) -> dict[str, Tensor]:
    """The model's buffers if they are small: a cast changes their values, and building the model again would not."""
    named = {name: local(buffer) for name, buffer in scene.model.named_buffers()}
    small = sum(value.nbytes for value in named.values()) <= SMALL_BYTES
    return {name: _stored(value) for name, value in named.items()} if small and scene.replay else {}


def _left_over(scene: CaughtContext, finding: Finding) -> dict[str, Tensor]:
    """Gradients that no backward pass writes, of the parameters that the finding is about."""
    named = {name: p.grad for name, p in scene.model.named_parameters() if name in finding.parameters}
    held = {name: local(gradient) for name, gradient in named.items() if gradient is not None}
    small = sum(value.nbytes for value in held.values()) <= SMALL_BYTES
    return {name: _stored(value) for name, value in held.items()} if small else {}


def _adapter_to_json(model: Any) -> dict[str, Any] | None:
    """Class and config of each adapter that peft has put on a base of another class; None without one."""
    configs = getattr(model, "peft_config", None)
    if not hasattr(model, "get_base_model") or not isinstance(configs, Mapping):
        return None
    written = {name: [type(config).__name__, _options(config)] for name, config in configs.items()}
    return {"base": type(model.get_base_model()).__name__, "configs": written, "active": model.active_adapter}


def _options(config: Any) -> dict[str, Any]:
    """What an adapter's config says beside its defaults."""
    written = {}
    for each in fields(config):
        value = getattr(config, each.name)
        value = value.value if isinstance(value, Enum) else sorted(value) if isinstance(value, set) else value
        plain = isinstance(value, (str, int, float, bool, list, dict))
        if each.init and plain and value != each.default and not (isinstance(value, dict) and not value):
            written[each.name] = jsonable(value)
    return written


def _call_to_json(call: ForwardCall, index: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    return {
        "step": call.step,
        "args": [_packed(value, f"{index}.{place}", tensors) for place, value in enumerate(call.args)],
        "kwargs": {name: _packed(value, f"{index}.{name}", tensors) for name, value in call.kwargs.items()},
        "autocast": {kind: str(dtype).removeprefix("torch.") for kind, dtype in call.autocast.items()},
        "cotangents": {
            name: _packed(value, f"{index}.back.{name}", tensors) for name, value in call.cotangents.items()
        },
        "rng": {name: state.numpy().tobytes().hex() for name, state in call.rng.items()},
    }


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The value in JSON's types; tensors go to the side and leave their key."""
    if isinstance(value, Tensor):
        tensors[name] = _stored(local(value))
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _packed(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_packed(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": jsonable(value)}
    return {"repr": repr(value)}


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _state(scene: CaughtContext) -> dict[str, Tensor]:
    if scene.optimizer is None:
        return {}
    return {
        f"{group}.{place}.{key}": value
        for group, content in enumerate(scene.optimizer.param_groups)
        for place, p in enumerate(content["params"])
        for key, value in scene.optimizer.state.get(p, {}).items()
        if isinstance(value, Tensor)
    }


def _digest(named: Mapping[str, Tensor]) -> str:
    """`sha256:…` over dtypes, shapes and bits, in the order of the names."""
    return f"sha256:{tensor_digest(local(named[name].detach()) for name in sorted(named))}"
