"""A bundle read back: checked against its digests, and its calls made on a model again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from numerics_suite.core.errors import BadInputError, NotApplicableError
from numerics_suite.core.findings import finding_from_json
from numerics_suite.core.json_text import read_json_text
from numerics_suite.core.numbers import revived
from numerics_suite.core.records import Finding
from numerics_suite.core.typed_records import refuse_other_shape
from numerics_suite.engine.kept_step import Kept, NoModelError, build
from numerics_suite.subjects.files import sha256_of
from numerics_suite.subjects.quiet import quiet_transformers
from numerics_suite.training_watch.bundle import BATCHES, JSON_NAME, KIND, OPTIMIZER, PARAMETERS, SCHEMA_VERSION
from numerics_suite.training_watch.caught_step import Start, bad_parameters
from numerics_suite.training_watch.diagnosis import CaughtContext
from numerics_suite.training_watch.optimizer_states import Loop, loop_from_json
from numerics_suite.training_watch.ring import ForwardCall

NUMBER = (int, float, str)
"""A text for one that is not finite."""

TEXT_OR_NONE = (str, type(None))
SHAPE = {
    **dict.fromkeys(("created_at!", "replay!", "parameters_are!"), str),
    "step!": int,
    "loss_scale!": NUMBER,
    "environment!": {"packages!": dict},
    "model!": {
        **dict.fromkeys(("class!", "module!", "dtype!"), str),
        "config!": (dict, type(None)),
        "adapter!": (dict, type(None)),
        "attn!": TEXT_OR_NONE,
        "training!": bool,
    },
    "calls!": [{"step!": int, "args!": list, "kwargs!": dict, "autocast!": dict, "rng!": dict}],
    "finding!": dict,
    "files!": dict,
}
"""What is read of `bundle.json`, here and where a bundle is reopened."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A caught step, read back.

    Attributes:
        path: of the folder.
        content: of `bundle.json`.
        finding: of the bad value.
        calls: whose inputs the folder holds whole, oldest first.
        parameters: that the folder holds, by name; empty without any.
        loop: how the watched loop stepped from these on, None where that was not kept.
    """

    path: Path
    content: Mapping[str, Any]
    finding: Finding
    calls: tuple[ForwardCall, ...]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    loop: Loop | None = None

    @cached_property
    def kept(self) -> Kept:
        """The same, as the folder's own script reads it."""
        return Kept(self.path)

    @property
    def step(self) -> int:
        """The bad step."""
        return int(self.content["step"])

    @property
    def scale(self) -> float:
        """The loss scale, 1 without one."""
        return float(revived(self.content["loss_scale"]))

    def start(self) -> Start | None:
        """Where the steps can be taken again from what the folder holds, None where it holds no parameters or no such calls."""
        first = self.loop.start if self.loop is not None else self.step
        calls = [_on_cpu(call) for call in self.calls if first <= call.step <= self.step]
        if not self.parameters or not calls:
            return None
        whole = {call.step for call in calls} == set(range(first, self.step + 1))
        words = f"the {self._words}"
        return Start(
            words=words,
            calls=calls,
            loop=self.loop,
            scale=self.scale,
            parameters=self.parameters,
            whole=whole,
            unheld=tuple(self.content.get("unheld", ())),
        )

    @property
    def _words(self) -> str:
        written = str(self.content["parameters_are"])
        return written.replace("those of the bad step", f"parameters of step {self.step}")


def read_bundle(path: Path) -> Bundle:
    """Read a folder that the watch wrote.

    Raises:
        BadInputError: it is none, of another version, or a file of it is missing or was changed.
    """
    content = _content(path)
    for name, digest in content["files"].items():
        file = path / Path(name).name
        if not file.is_file():
            message = f"--bundle: {path} is torn: {name} is missing"
            raise BadInputError(message)
        if f"sha256:{sha256_of(file)}" != digest:
            message = f"--bundle: {file} was changed or is torn: its SHA-256 is not the one in {JSON_NAME}"
            raise BadInputError(message)
    try:
        refuse_other_shape(content, SHAPE, "bundle")
        float(revived(content["loss_scale"]))
        tensors = load_file(path / BATCHES)
        calls = tuple(call for written in content["calls"] if (call := _call(written, tensors)) is not None)
        loop = content.get("loop")
        return Bundle(
            path=path,
            content=content,
            finding=_finding(content["finding"], path),
            calls=calls,
            parameters=_tensors(path / PARAMETERS),
            loop=None if loop is None else loop_from_json(loop, _tensors(path / OPTIMIZER)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, SafetensorError, OSError) as error:
        message = f"--bundle: {path} cannot be read: {type(error).__name__}: {error}"
        raise BadInputError(message) from None


def _tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path) if path.is_file() else {}


def _content(path: Path) -> dict[str, Any]:
    try:
        content = read_json_text(path / JSON_NAME)
    except OSError as error:
        message = f"--bundle: {path} is no bundle of the watch: {JSON_NAME}: {error.strerror}"
        raise BadInputError(message) from None
    except ValueError as error:
        message = f"--bundle: {path / JSON_NAME} is torn: it is not whole JSON ({error})"
        raise BadInputError(message) from None
    if not isinstance(content, dict) or content.get("kind") != KIND or not isinstance(content.get("files"), dict):
        message = f"--bundle: {path} is no bundle of the watch: {JSON_NAME} is not its"
        raise BadInputError(message)
    if content.get("schema_version") != SCHEMA_VERSION:
        message = f"--bundle: {path} has schema_version {content.get('schema_version')!r}; this release reads {SCHEMA_VERSION}"
        raise BadInputError(message)
    return content


def _finding(written: Mapping[str, Any], path: Path) -> Finding:
    finding = finding_from_json(written, "finding.")
    return finding if finding.reproducer is None else replace(finding, reproducer=str(path / finding.reproducer))


def _call(written: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ForwardCall | None:
    """The call, None where an input could not be kept."""
    try:
        args = tuple(_unpacked(value, tensors) for value in written["args"])
        kwargs = {name: _unpacked(value, tensors) for name, value in written["kwargs"].items()}
    except _NotKept:
        return None
    rng = {name: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8) for name, text in written["rng"].items()}
    autocast = {kind: _dtype(name) for kind, name in written["autocast"].items()}
    return ForwardCall(step=written["step"], args=args, kwargs=kwargs, rng=rng, autocast=autocast)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        message = f"{name} is no dtype"
        raise TypeError(message)
    return found


class _NotKept(Exception):  # noqa: N818 - a signal within this file, not an error
    """An input was neither a tensor nor a plain value."""


def _unpacked(value: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {name: _unpacked(item, tensors) for name, item in inner.items()}
    if kind in {"list", "tuple"}:
        items = [_unpacked(item, tensors) for item in inner]
        return tuple(items) if kind == "tuple" else items
    if kind == "value":
        return revived(inner)
    raise _NotKept


def _on_cpu(call: ForwardCall) -> ForwardCall:
    return replace(call, rng={"cpu": call.rng["cpu"]})


def scene_of(bundle: Bundle, model: nn.Module, starts: Sequence[Start]) -> CaughtContext:
    """What the watch had at hand, as far as the folder has it.

    Args:
        bundle: as read.
        model: on the CPU; put in the mode, training or evaluation, that the watched one was in.
        starts: from which its steps can be taken.
    """
    model.train(bool(bundle.content["model"]["training"]))
    return CaughtContext(
        model=model,
        optimizer=None,
        calls=_calls_of_bad_step(bundle),
        starts=starts,
        updated=True,  # whether the value arose in the step or in its update, the steps themselves say
        initially_bad=bad_parameters(model),
        scale=bundle.scale,
        largest_copy=math.inf,
        seconds=math.inf,
    )


def _calls_of_bad_step(bundle: Bundle) -> list[ForwardCall]:
    return [_on_cpu(call) for call in bundle.calls if call.step == bundle.step]


def bad_calls(bundle: Bundle) -> list[ForwardCall]:
    """The bad step's calls.

    Raises:
        BadInputError: none was kept whole.
    """
    calls = _calls_of_bad_step(bundle)
    if not calls:
        message = f"--bundle: {bundle.path} holds no batch of step {bundle.step} that can be replayed"
        raise BadInputError(message)
    return calls


def built_model(bundle: Bundle) -> nn.Module:
    """The watched model, of a class of transformers, with its adapters and the parameters that the folder holds.

    Raises:
        NotApplicableError: it is another class, or the folder does not hold every parameter.
    """
    try:
        with quiet_transformers():
            return build(bundle.kept)
    except NoModelError as error:
        reason = f"not tried: {error}"
        raise NotApplicableError(reason) from None
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        name = bundle.content["model"]["class"]
        reason = f"not tried: {name} cannot be built from the bundle's config ({type(error).__name__})"
        raise NotApplicableError(reason) from error
