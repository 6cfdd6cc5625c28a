"""train.clip."""

from __future__ import annotations

import math
from collections.abc import Iterable

from numerics_suite.checks.train._curves import clipped_norms, gradient_norms, losses, over_steps
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement, Series
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.training_loop import RECIPE_NORM, TRAJECTORY, Trajectory

LIMIT = RECIPE_NORM
"""The norm to clip to without `--max-grad-norm`."""


@check(trains=True, reads=(TRAJECTORY,))
def clip(context: CellContext) -> Iterable[Measurement | Series]:
    """Does clipping the total gradient norm hold it at the limit and keep training finite?

    If a run is finite only with clipping to 1.0, the result says so: the gradients explode.
    """
    asked = context.request.plan.max_grad_norm
    free = context.trajectory
    if asked is None and _tells_all(free, context):
        yield from _of_copy(free)
        return
    limit = asked if asked is not None else LIMIT
    run = free if asked is not None else context.train(context.with_plan(max_grad_norm=limit))
    yield from (*losses(run), *gradient_norms(run), *clipped_norms(run))
    if run.bad is not None and (free.bad is None or run.bad.step <= free.bad.step):
        if free.bad is not None:
            reason = "training is not finite with or without clipping (train.finite)"
            raise NotApplicableError(reason)
        yield Measurement(name="non-finite", value=1, unit="runs", step=run.bad.step)
        return
    if not run.clipped_norms:
        reason = "no step came as far as clipping"
        raise NotApplicableError(reason)
    largest = max(run.clipped_norms)
    yield _excess(largest, limit, max(run.gradient_norms))
    yield Measurement(
        name="saved-by-clipping",
        value=int(_exploded(free) and not _exploded(run)),
        unit="runs",
        step=free.bad.step if free.bad else None,
        facts={"without clipping": _curve(free), "with clipping": _curve(run)},
    )


def _tells_all(free: Trajectory, context: CellContext) -> bool:
    """Whether the run without clipping shows what clipping does, so that no second run is needed.

    It stays finite, and clipped gradients are the same ones times a factor below 1: an Adam's step does not depend on
    the factor, and plain descent's step only gets smaller. Float16 is the exception, where the square of a small
    gradient is 0 and the step is divided by it. Only the clipping itself remains to check, on a copy of the gradients.
    """
    dtypes = {str(parameter.dtype) for parameter in context.model.parameters()}
    copy = free.clipped_copy
    return (
        bool(free.gradient_norms)
        and not _exploded(free)
        and "torch.float16" not in dtypes
        and (copy is None or math.isfinite(copy.after))
    )


def _of_copy(free: Trajectory) -> Iterable[Measurement | Series]:
    """The measurements if nothing had to be clipped, or only a copy of one step's gradients was."""
    yield from (*losses(free), *gradient_norms(free))
    copy, norms = free.clipped_copy, [norm for norm in free.gradient_norms if math.isfinite(norm)]
    if copy is None:
        if not norms:  # the loss scaler skipped every step
            reason = "no step came as far as clipping"
            raise NotApplicableError(reason)
        yield _excess(max(norms), LIMIT, max(norms))
    else:
        yield from over_steps("clipped-norm", "norm", [copy.after], [copy.step])
        yield _excess(copy.after, LIMIT, copy.before)
    yield Measurement(name="saved-by-clipping", value=0, unit="runs", facts={"without clipping": _curve(free)})


def _excess(largest: float, limit: float, before: float) -> Measurement:
    """By how much a norm after clipping is above the limit.

    Args:
        largest: of the norms after clipping.
        limit: that it is clipped to.
        before: the largest norm before clipping.
    """
    return Measurement(
        name="excess",
        value=max(0.0, largest / limit - 1.0) if math.isfinite(largest) else largest,
        unit="ratio",
        facts={"largest norm after clipping": largest, "limit": limit, "largest before": before},
    )


def _exploded(run: Trajectory) -> bool:
    """Non-finite, or a loss that grew tenfold at any step.

    A model that exploded may end at a small loss: with all states lost it gives every token the same probability.
    """
    return run.bad is not None or (len(run.losses) > 1 and max(run.losses) > 10 * max(abs(run.losses[0]), 1.0))


def _curve(run: Trajectory) -> str:
    return ", ".join(f"{loss:.4g}" for loss in run.losses) + ("" if run.bad is None else f", then {run.bad.kind} NaN")
