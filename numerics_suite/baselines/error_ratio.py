"""Errors of two versions against what chance explains."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from numerics_suite.baselines.localize import gradient_place
from numerics_suite.baselines.sampling_error import SHARE, two_draws

if TYPE_CHECKING:
    from numerics_suite.baselines.batch_match import Matching
    from numerics_suite.baselines.records import CellBaseline


@dataclass(frozen=True, slots=True, kw_only=True)
class Errors:
    """An error in the cell's precision, old and new.

    Attributes:
        name: of the module; empty for the whole model.
        old: in the unit of the record.
        ratio: new over old; 1 where both are zero.
        excess: new over the most that the old one and chance explain.
        relief: the same the other way round: old over the most that the new one and chance explain.
    """

    name: str
    old: float
    new: float
    ratio: float
    excess: float
    relief: float


def compared(name: str, old: float, new: float, draws: float, order: float, least: float = 0.0) -> Errors:  # noqa: PLR0913, PLR0917
    """Two errors, and how each compares with what the other and chance explain.

    Args:
        name: of the module.
        old: the reference.
        new: the other.
        draws: the largest ratio that chance explains.
        order: what another order of sums may add.
        least: an error up to this is none.
    """

    def over(value: float, reference: float) -> float:
        if math.isnan(value):
            return 0.0 if math.isnan(reference) else math.inf
        if math.isnan(reference) or value <= least or value == reference:
            return 0.0
        allowed = max(reference * draws, least) + order
        return value / allowed if allowed else math.inf

    both_zero = old == new
    ratio = 1.0 if both_zero else (new / old if old else math.inf)
    return Errors(name=name, old=old, new=new, ratio=ratio, excess=over(new, old), relief=over(old, new))


def even(item: Errors) -> Errors:
    """The same errors where nothing can have changed."""
    return Errors(name=item.name, old=item.old, new=item.new, ratio=item.ratio, excess=0.0, relief=0.0)


def gradient_growth(old: CellBaseline, new: CellBaseline, parameters: Matching) -> Errors | None:
    """The errors of all gradients together, and the module where they begin to grow; None without a common one.

    Every parameter counts once: its projections are draws of one error, and much of that it shares with others.
    """
    pairs = [(old.gradients[i], new.gradients[j]) for i, j in parameters.pairs]
    known = [(ours, theirs) for ours, theirs in pairs if ours.error is not None and theirs.error is not None]
    if not known:
        return None
    whole = compared(
        "",
        _together([ours.error for ours, _ in known if ours.error is not None]),
        _together([theirs.error for _, theirs in known if theirs.error is not None]),
        two_draws(len(known) * SHARE, len(known) + 1),
        0.0,
    )
    if whole.excess <= 1:
        return whole
    grown = []
    for ours, theirs in known:
        assert ours.error is not None and theirs.error is not None  # noqa: PT018 - one fact
        alone = two_draws(ours.gradient.projections.size * SHARE, len(known) + 1)
        if not compared(theirs.name, ours.error, theirs.error, alone, 0.0).excess <= 1:
            grown.append(theirs.name)
    return replace(whole, name=gradient_place(new.modules, grown) or "")


def _together(errors: list[float]) -> float:
    """The median, which one parameter's outlier does not move; NaN with a NaN."""
    if any(math.isnan(error) for error in errors):
        return math.nan
    return sorted(errors)[len(errors) // 2]
