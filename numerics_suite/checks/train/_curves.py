"""A training run as series over its steps, for people to see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from numerics_suite.core.records import Series
from numerics_suite.engine.training_loop import Trajectory


def losses(run: Trajectory) -> Iterator[Series]:
    """The loss before each step and after the last; where logits or loss were not finite, that step's loss too."""
    values = list(run.losses)
    if run.bad is not None and run.bad.kind in {"logits", "loss"}:
        values.append(run.bad.loss)
    yield from over_steps("loss", "nats", values)


def gradient_norms(run: Trajectory) -> Iterator[Series]:
    """The total norm before clipping, of each step that got as far."""
    yield from over_steps("gradient-norm", "norm", run.gradient_norms)


def clipped_norms(run: Trajectory) -> Iterator[Series]:
    """The total norm after clipping, of each step that was clipped."""
    yield from over_steps("clipped-norm", "norm", run.clipped_norms, run.clipped_at)


def loss_scales(run: Trajectory) -> Iterator[Series]:
    """The loss scale after each step."""
    yield from over_steps("loss-scale", "factor", run.scales)


def over_steps(name: str, unit: str, values: Sequence[float], at: Sequence[int] = ()) -> Iterator[Series]:
    """One series, none without a value.

    Args:
        name: of the series.
        unit: of its values.
        values: in the order of the steps.
        at: the steps, from 1 on where none are given.
    """
    if values:
        steps = tuple(at) or tuple(range(1, len(values) + 1))
        yield Series(name=name, unit=unit, along="step", at=steps, values=tuple(values))
