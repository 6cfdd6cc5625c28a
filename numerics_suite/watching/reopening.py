"""A bundle read back: held to its digests, and its calls made on a model again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.findings import finding_from_json
from numerics_suite.core.numbers import revived
from numerics_suite.core.records import Finding
from numerics_suite.observing.locate import Origin
from numerics_suite.subjects.files import sha256_of
from numerics_suite.watching.bundle import BATCHES, JSON_NAME, KIND, SCHEMA_VERSION
from numerics_suite.watching.diagnose import Scene, run_again
from numerics_suite.watching.ring import Call


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A caught step, read back.

    Attributes:
        path: of the folder.
        content: of `bundle.json`.
        finding: of the bad value.
        calls: whose inputs the folder holds whole, oldest first.
    """

    path: Path
    content: Mapping[str, Any]
    finding: Finding
    calls: tuple[Call, ...]

    @property
    def step(self) -> int:
        """The bad step."""
        return int(self.content["step"])


def read_bundle(path: Path) -> Bundle:
    """Read a folder that the watch wrote.

    Args:
        path: of the folder.

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
        tensors = load_file(path / BATCHES)
        calls = tuple(call for written in content["calls"] if (call := _call(written, tensors)) is not None)
        return Bundle(path=path, content=content, finding=_finding(content["finding"], path), calls=calls)
    except (KeyError, TypeError, ValueError, AttributeError, SafetensorError, OSError) as error:
        message = f"--bundle: {path} cannot be read: {type(error).__name__}: {error}"
        raise BadInputError(message) from None


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads((path / JSON_NAME).read_text(encoding="utf-8"))
    except OSError as error:
        message = f"--bundle: {path} is no bundle of the watch: {JSON_NAME}: {error.strerror}"
        raise BadInputError(message) from None
    except ValueError:
        message = f"--bundle: {path / JSON_NAME} is torn: it is not whole JSON"
        raise BadInputError(message) from None
    if not isinstance(content, dict) or content.get("kind") != KIND or not isinstance(content.get("files"), dict):
        message = f"--bundle: {path} is no bundle of the watch: {JSON_NAME} is not its"
        raise BadInputError(message)
    if content.get("schema_version") != SCHEMA_VERSION:
        message = f"--bundle: {path} has schema_version {content.get('schema_version')!r}; this release reads {SCHEMA_VERSION}"
        raise BadInputError(message)
    return content


def _finding(written: Mapping[str, Any], path: Path) -> Finding:
    finding = finding_from_json(written)
    return finding if finding.reproducer is None else replace(finding, reproducer=str(path / finding.reproducer))


def _call(written: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Call | None:
    """The call, None where an input could not be kept."""
    try:
        args = tuple(_unpacked(value, tensors) for value in written["args"])
        kwargs = {name: _unpacked(value, tensors) for name, value in written["kwargs"].items()}
    except _NotKept:
        return None
    rng = {name: torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8) for name, text in written["rng"].items()}
    autocast = {kind: getattr(torch, name) for kind, name in written["autocast"].items()}
    return Call(step=written["step"], args=args, kwargs=kwargs, rng=rng, autocast=autocast)


class _NotKept(Exception):  # noqa: N818 - a signal within this file, not an error
    """An input was neither a tensor nor a plain value."""


def _unpacked(value: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    (kind, inner) = next(iter(value.items()))
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


def replay(bundle: Bundle, model: nn.Module) -> Origin | None:
    """Run the bad step's calls on a model, forward and backward; where a value stops being finite, None where all stay finite.

    Args:
        bundle: as read.
        model: on the CPU; put in the mode, training or evaluation, that the watched one was in.

    Raises:
        BadInputError: no call of that step was kept whole.
    """
    calls = [call for call in bundle.calls if call.step == bundle.step]
    if not calls:
        message = f"--bundle: {bundle.path} holds no batch of step {bundle.step} that can be replayed"
        raise BadInputError(message)
    model.train(bool(bundle.content["model"]["training"]))
    rng = [
        Call(step=c.step, args=c.args, kwargs=c.kwargs, rng={"cpu": c.rng["cpu"]}, autocast=c.autocast) for c in calls
    ]
    scale = float(revived(bundle.content["loss_scale"]))
    return run_again(Scene(model=model, optimizer=None, calls=rng, scale=scale), {}, backward=True)
