"""Two training curves: whether the steps are the same in true fp64, and how far rounding leads from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from numerics_suite.baselines.batch_match import deviation, worst
from numerics_suite.baselines.sampling_error import ROUNDOFF

if TYPE_CHECKING:
    from numerics_suite.baselines.records import CellBaseline, TrainingCurve


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveChange:
    """Training.

    Attributes:
        true: deviation of the true fp64 losses and gradient norms, over the largest of the old ones.
        growth: distance from the true fp64 losses in the cell's precision, over what rounding explains.
        old: losses before each step and after the last, in the cell's precision.
        became_nonfinite: the step, from 1, at which the new curve and not the old one ends to be finite; None for none.
    """

    true: float
    growth: float
    old: tuple[float, ...]
    new: tuple[float, ...]
    became_nonfinite: int | None


def curve_change(old: CellBaseline, new: CellBaseline) -> CurveChange | None:
    """How training changed, None where one of the two was not trained."""
    ours, theirs = old.curve, new.curve
    if not (ours.losses and theirs.losses):
        return None
    return CurveChange(
        true=worst([_series(ours.true_losses, theirs.true_losses), _series(ours.true_norms, theirs.true_norms)])
        if theirs.true_losses
        else 0.0,
        growth=_growth(old, new),
        old=ours.losses,
        new=theirs.losses,
        became_nonfinite=_first_nonfinite(ours, theirs),
    )


def lost_curve(old: TrainingCurve, new: TrainingCurve) -> list[str]:
    """The parts of the curve that are no longer measured."""
    parts = (("losses", "training curve"), ("true_losses", "training curve in true fp64"))
    reason = f" ({new.reason})" if new.reason else ""
    return [f"{told}{reason}" for name, told in parts if getattr(old, name) and not getattr(new, name)]


def _series(old: Sequence[float], new: Sequence[float]) -> float:
    left, right = np.asarray(old, dtype=np.float64), np.asarray(new, dtype=np.float64)
    return deviation(left, right, float(np.max(np.abs(left), initial=0.0)))


def _first_nonfinite(old: TrainingCurve, new: TrainingCurve) -> int | None:
    """The first step at which the new curve is not finite while the old one is finite throughout that far."""
    for step, (left, right) in enumerate(zip(old.losses, new.losses, strict=False), start=1):
        if not math.isfinite(left):
            return None
        if not math.isfinite(right):
            return step
    for step, (left, right) in enumerate(zip(old.norms, new.norms, strict=False), start=1):
        if math.isfinite(left) and not math.isfinite(right):
            return step
    return None


def _growth(old: CellBaseline, new: CellBaseline) -> float:
    """The new curve's largest distance from true fp64 over the size that rounding gives it.

    That size is the old curve's own largest distance, or what the error of the logits makes of the loss, if that is more:
    the loss's derivative by a token's logits is a difference of two distributions, of length sqrt(2) at most.
    """
    ours, theirs = (_distance(item.curve) for item in (old, new))
    logits = max((answer.rms for answer in old.answers if math.isfinite(answer.rms)), default=0.0)
    errors = [value for value in (old.error, old.inherent) if math.isfinite(value)]
    size = max(ours, math.sqrt(2) * max(errors, default=0.0) * logits, ROUNDOFF[old.cell.precision] * _size(old.curve))
    if not math.isfinite(theirs):
        return 0.0 if not math.isfinite(ours) else math.inf
    return theirs / size if size else (math.inf if theirs else 0.0)


def _distance(curve: TrainingCurve) -> float:
    pairs = zip(curve.losses, curve.true_losses, strict=False)
    return worst([abs(loss - true) for loss, true in pairs]) if curve.losses else 0.0


def _size(curve: TrainingCurve) -> float:
    return max((abs(loss) for loss in curve.true_losses if math.isfinite(loss)), default=0.0)
