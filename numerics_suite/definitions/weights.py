"""Weights by name, in float64, one at a time: from a checkpoint's safetensors files or from tensors at hand."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open

from numerics_suite.definitions.config import OracleUnavailable

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping
    from pathlib import Path

    from torch import Tensor

Rows = slice | torch.Tensor | None
"""Rows of a weight: a range, `[n]` indices, or all of them."""


STORED = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Floats by their names in safetensors files."""


class Weights(Protocol):
    """A checkpoint's tensors by name. Each call returns a new tensor."""

    def __call__(self, name: str, rows: Rows = None) -> Tensor:
        """That weight (or those rows of it) in float64, detached.

        Raises:
            OracleUnavailable: the checkpoint has no such weight.
        """
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole weight's shape.

        Raises:
            OracleUnavailable: the checkpoint has no such weight.
        """
        ...

    def rounding(self) -> Hashable:
        """What the stored numbers are rounded to; None where each is taken as it stands."""
        ...


@dataclass(frozen=True, slots=True)
class _Tensors:
    """Weights out of tensors at hand, such as a state dict."""

    tensors: Mapping[str, Tensor]

    def __call__(self, name: str, rows: Rows = None) -> Tensor:
        tensor = self._find(name).detach()
        return (tensor if rows is None else tensor[rows]).to("cpu", torch.float64)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._find(name).shape)

    def rounding(self) -> Hashable:
        return None

    def _find(self, name: str) -> Tensor:
        if name not in self.tensors:
            message = f"the definition needs the weight '{name}', which is not there"
            raise OracleUnavailable(message)
        return self.tensors[name]


@dataclass(frozen=True, slots=True)
class _Files:
    """Weights out of safetensors files, mapped into memory, so only requested rows are read."""

    index: Mapping[str, Path]
    rounded_to: torch.dtype | None
    held: Mapping[str, torch.dtype] = field(default_factory=dict)
    opened: dict[Path, Any] = field(default_factory=dict)

    def __call__(self, name: str, rows: Rows = None) -> Tensor:
        file, stored = self._locate(name)
        tensor: Tensor = file.get_tensor(stored)
        tensor = tensor if rows is None else tensor[rows]
        dtype = self.held.get(name, self.rounded_to)
        return (tensor if dtype is None else tensor.to(dtype)).to(torch.float64)

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._locate(name)
        return tuple(file.get_slice(stored).get_shape())

    def rounding(self) -> Hashable:
        files = {name: self._locate(name)[0] for name in self.index}
        stored = {STORED.get(file.get_slice(name).get_dtype()) for name, file in files.items()}
        held = {dtype for dtype in (self.rounded_to, *self.held.values()) if dtype is not None}
        # A float holds every number of one to which both promote.
        if all(dtype is not None and torch.promote_types(dtype, wide) == wide for dtype in stored for wide in held):
            return None
        return self.rounded_to, tuple(self.held.items())

    def _locate(self, name: str) -> tuple[Any, str]:
        # A checkpoint of the bare base model has its names without the leading `model.` or `transformer.`.
        for stored in (name, name.partition(".")[2]):
            if stored in self.index:
                path = self.index[stored]
                if path not in self.opened:
                    self.opened[path] = safe_open(path, framework="pt")
                return self.opened[path], stored
        message = f"the definition needs the weight '{name}', which no file of the checkpoint holds"
        raise OracleUnavailable(message)


def tensor_weights(tensors: Mapping[str, Tensor]) -> Weights:
    """Weights out of tensors by name, such as `model.state_dict()`; each is upcast when read."""
    return _Tensors(tensors)


def file_weights(
    directory: Path, rounded_to: torch.dtype | None = None, held: Mapping[str, torch.dtype] | None = None
) -> Weights:
    """Weights out of a checkpoint's safetensors files, one file or sharded.

    Args:
        directory: the checkpoint's folder.
        rounded_to: the dtype that the judged model was loaded in, where it is not the stored one.
        held: the dtypes of those parameters that the model holds in another one, by name. `load.dtype` judges the
            dtypes; the definition judges what is computed with them.

    Raises:
        OracleUnavailable: the folder has no safetensors files.
    """
    sharded = directory / "model.safetensors.index.json"
    if sharded.is_file():
        shards = json.loads(sharded.read_text(encoding="utf-8"))["weight_map"]
        return _Files({name: directory / file for name, file in shards.items()}, rounded_to, held or {})
    single = directory / "model.safetensors"
    if not single.is_file():
        message = "the oracle reads safetensors files, and the checkpoint has none"
        raise OracleUnavailable(message)
    with safe_open(single, framework="pt") as file:
        return _Files(dict.fromkeys(file.keys(), single), rounded_to, held or {})
