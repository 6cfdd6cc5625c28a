"""Where a change starts: the first module, innermost and in the order of returning, whose inputs agree and whose output does not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from numerics_suite.baselines.matching import AGREED, Matching, sketch_deviation

if TYPE_CHECKING:
    from numerics_suite.baselines.records import CellBaseline, ModuleRecord, Sketch


def module_place(old: Sequence[ModuleRecord], new: Sequence[ModuleRecord], matching: Matching) -> str | None:
    """The module of the new version at which true fp64 states part, None where none does.

    Args:
        old: in the order of returning.
        new: likewise.
        matching: which is which.
    """
    apart = [(old[i], new[j]) for i, j in matching.pairs if _differ(old[i].gave, new[j].gave)]
    for ours, theirs in apart:
        if not _differ(ours.given, theirs.given):
            return theirs.name
    return apart[0][1].name if apart else None


def gradient_place(cell: CellBaseline, parameters: Sequence[str]) -> str | None:
    """The module at which gradients part: backwards, the first whose own parameters differ, so the last one to return.

    Args:
        cell: the new version.
        parameters: names of those whose gradients differ.
    """
    order = {module.name: index for index, module in enumerate(cell.modules)}
    owners = {name.rpartition(".")[0] for name in parameters}
    return max(owners, key=lambda owner: order.get(owner, -1), default=None)


def _differ(old: Sketch | None, new: Sketch | None) -> bool:
    """Whether both are known and differ."""
    return old is not None and new is not None and not sketch_deviation(old, new) <= AGREED
