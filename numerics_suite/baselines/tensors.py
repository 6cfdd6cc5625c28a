"""The model's own tensors, parameters and buffers, as they are held: which of them differ between two versions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from numerics_suite.baselines.batch_match import sketch_deviation

if TYPE_CHECKING:
    from torch import nn

    from numerics_suite.baselines.fused_experts import Fusion
    from numerics_suite.baselines.records import CellBaseline, TensorRecord

SAME: Final = 1e-12
"""Sketches of equal tensors differ by less, in root mean squares of the tensor: only the order of their float64 sums may differ.
One element of a thousand million that moves by one last bit of float32 gives more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """One tensor that is not what it was.

    Attributes:
        name: in the new version.
        old: dtype and shape, as text.
        value: largest difference of the sketches over the root mean square of the old one; infinite for another shape.
    """

    name: str
    old: str
    new: str
    value: float


def tensor_records(model: nn.Module) -> tuple[TensorRecord, ...]:
    """Every parameter and buffer by its first name, those that are not stored too."""
    from numerics_suite.baselines.records import TensorRecord
    from numerics_suite.baselines.sketch import sketch

    return tuple(
        TensorRecord(name=name, dtype=str(tensor.dtype).removeprefix("torch."), values=sketch(tensor.detach()))
        for named in (model.named_parameters(), model.named_buffers())
        for name, tensor in named
        if tensor.numel() and not tensor.is_meta
    )


def tensor_changes(
    old: CellBaseline, new: CellBaseline, renamed: Sequence[tuple[str, str]], fused: Sequence[Fusion]
) -> tuple[TensorChange, ...]:
    """Tensors of both versions that differ in values, dtype or shape; nothing where one baseline holds none.

    Args:
        old: the reference.
        new: the other.
        renamed: parameters of other names, old and new.
        fused: those that were found by value, and so do not differ.
    """
    names = dict(renamed)
    others = {record.name: record for record in new.tensors}
    apart = {name for fusion in fused for name in fusion.old}
    found = []
    for ours in old.tensors:
        theirs = others.get(ours.name) or others.get(names.get(ours.name, ""))
        if theirs is None or ours.name in apart:
            continue
        value = sketch_deviation(ours.values, theirs.values)
        if not value <= SAME or ours.dtype != theirs.dtype:
            found.append(TensorChange(name=theirs.name, old=_told(ours), new=_told(theirs), value=value))
    return tuple(found)


def _told(record: TensorRecord) -> str:
    return f"{record.dtype} {list(record.values.shape)}"
