"""Which buffers lost bits on their way into the model: to a cast after loading, or to the file that a cast model was saved in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from numerics_suite.engine.cell_context import CellContext
from numerics_suite.subjects.built_model import built_buffers, without_adapter
from numerics_suite.subjects.files import read_tensor, tensor_headers

NARROW = (torch.bfloat16, torch.float16)
NARROWEST = torch.bfloat16
"""A buffer that is wider than this default dtype while the class is built has a dtype that the class itself names."""


def rounded_buffers(context: CellContext) -> dict[str, str]:
    """What was lost, by name, of the buffers that the class keeps in float32 but holds or stores with fewer bits.

    A buffer that the class builds in the dtype of the load is correct, however narrow: its rounding is part of the
    model.

    Args:
        context: the cell; a subject without a config to build from has none.
    """
    model = without_adapter(context.model)
    suspects = dict(_suspects(model, _stored(context)))
    built = built_buffers(model, NARROWEST) if suspects else None
    if built is None:
        return {}
    saved = model.state_dict().keys()
    lost: dict[str, str] = {}
    for name, (held, stored) in suspects.items():
        made = built.get(name)
        if made is None or made.dtype not in (torch.float32, torch.float64) or made.shape != held.shape:
            continue
        # What is saved begins as zeros or ones; its value is the file's.
        wide = stored if stored is not None and stored.dtype not in NARROW else None if name in saved else made
        said = _by_value(held, wide) if wide is not None else _by_ties(held if stored is None else stored, stored)
        if said is not None:
            lost[name] = said
    return lost


def _stored(context: CellContext) -> Mapping[str, Tensor]:
    """The stored tensors that are buffers of the model."""
    if context.subject.path is None or context.subject.quantized:
        return {}
    folder = Path(context.subject.adapter_base or context.subject.path)
    headers = tensor_headers(folder)
    names = [name for name, _ in without_adapter(context.model).named_buffers() if name in headers]
    return {name: read_tensor(folder, name) for name in names}


def _suspects(model: nn.Module, stored: Mapping[str, Tensor]) -> Iterator[tuple[str, tuple[Tensor, Tensor | None]]]:
    """Buffers that may be rounded, with their stored values: only for these is the class built again."""
    for name, buffer in model.named_buffers():
        if not buffer.is_floating_point() or buffer.numel() == 0:
            continue
        held, kept = buffer.detach().cpu(), stored.get(name)
        if kept is not None and (not kept.is_floating_point() or (kept.dtype not in NARROW and _same(held, kept))):
            continue
        narrow = kept is not None and kept.dtype in NARROW
        if narrow or held.dtype in NARROW or any(_same(held, held.to(dtype)) for dtype in NARROW):
            yield name, (held, kept)


def _by_value(held: Tensor, wide: Tensor) -> str | None:
    """What was lost if the right value is known: the held one is exactly its rounding."""
    if _same(held, wide):
        return None
    narrow = next((dtype for dtype in NARROW if _same(held, wide.to(dtype))), None)
    if narrow is None:
        return None
    differing = int((held.double() != wide.double()).sum())
    return f"{differing} of {wide.numel()} values rounded from {_name(wide.dtype)} to {_name(narrow)}"


def _by_ties(kept: Tensor, stored: Tensor | None) -> str | None:
    """What was lost if only the narrow values remain: entries that became equal.

    All zeros are untrained, and a single value for all is exact.
    """
    if kept.dtype not in NARROW:
        return None
    values = kept[kept != 0]
    distinct = len(set(values.flatten().tolist()))
    if distinct == len(values) or distinct <= 1:
        return None
    where = "held" if stored is None else "stored"
    return f"{where} in {_name(kept.dtype)}: {distinct} distinct values of {len(values)}"


def _same(left: Tensor, right: Tensor) -> bool:
    return left.shape == right.shape and torch.equal(left.double(), right.double())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
