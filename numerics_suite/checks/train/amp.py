"""train.amp."""

from __future__ import annotations

import math
from collections.abc import Iterable

from numerics_suite.checks.train._curves import loss_scales
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement, Series
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.training_loop import TRAJECTORY

INITIAL_SCALE = 65536.0
"""Initial scale of torch's GradScaler."""

LOST_SCALE = 1.0
"""Below a scale of 1 the gradients overflow even unscaled, or are not finite at all."""


@check(trains=True, runs_on_nonfinite=True, reads=(TRAJECTORY,))
def amp(context: CellContext) -> Iterable[Measurement | Series]:
    """Under autocast, do parameters and gradients keep their dtype and does the loss scale settle?

    A scaler that skips the first few steps works as designed. One that is still skipping when its scale has fallen
    below 1 will never stop: the gradients themselves are not finite.
    """
    if context.recipe.autocast is None:
        reason = f"{context.recipe.name} has no autocast"
        raise NotApplicableError(reason)
    run = context.trajectory
    if run.bad is not None and run.bad.kind in {"logits", "loss"} and not run.scales:
        reason = "the first forward pass was not finite (train.finite)"
        raise NotApplicableError(reason)
    drifted = (*run.parameter_drift, *run.gradient_dtypes)
    yield Measurement(name="dtype-drift", value=len(drifted), unit="parameters", parameters=drifted)
    if not context.recipe.loss_scaling:
        return
    if run.skipped == len(run.gradient_norms):
        run = context.train(context.with_plan(steps=_halvings(context.request.plan.init_scale)))
    # A longer run may fit again at a scale below 1, where the small gradients are lost.
    stuck = run.skipped == len(run.gradient_norms) or min(run.scales) < LOST_SCALE
    yield Measurement(
        name="skipped-forever",
        value=int(stuck),
        unit="runs",
        step=len(run.scales),
        facts={"steps": len(run.scales), "skipped": run.skipped, "loss scale": run.scales[-1] if run.scales else 0.0},
    )
    yield from loss_scales(run)


def _halvings(scale: float | None) -> int:
    """Halvings until the loss scale is below 1, where scaling no longer helps.

    With a fixed number, an initial scale of 16 would end at 1e-4: a run that looks finite and has lost its small
    gradients.
    """
    return max(1, math.floor(math.log2(scale or INITIAL_SCALE)) + 1)
