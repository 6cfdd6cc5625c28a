"""train.descends."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from numerics_suite.checks.train._curves import gradient_norms, losses
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement, Series
from numerics_suite.core.registry import check
from numerics_suite.devices.condition import dtype_of
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.training_loop import TRAJECTORY


@check(trains=True, reads=(TRAJECTORY,))
def descends(context: CellContext) -> Iterable[Measurement | Series]:
    """Is the loss on the training batch lower after N steps on it?

    First-order theory predicts the decrease of the loss in the first step (learning rate times the gradient's 1-norm
    for Adam). The check measures the rise of the loss in units of what the precision can resolve. Where the predicted
    fall is below that, theory predicts a flat curve and the check does not apply.
    """
    run = context.trajectory
    if run.bad is not None:
        reason = "training met a non-finite value (train.finite)"
        raise NotApplicableError(reason)
    effective = len(run.gradient_norms) - run.skipped
    if effective == 0:
        reason = "the loss scaler skipped every step (train.amp)" if run.skipped else "no step was taken"
        raise NotApplicableError(reason)
    first, last = run.losses[0], run.losses[-1]
    resolution = _resolution(context, first)
    facts: dict[str, float | str] = {
        "losses": ", ".join(f"{loss:.5g}" for loss in run.losses),
        "predicted fall of the first step": run.predicted_decrease,
        "smallest change the precision resolves": resolution,
    }
    asked = run.predicted_decrease > resolution
    rise = (last - min(first, *run.losses)) if last > first else last - first
    yield Measurement(
        name="rise",
        value=rise / resolution if asked else min(rise / resolution, 0.0),
        unit="resolutions",
        step=effective,
        facts=facts,
    )
    yield Measurement(name="fall", value=first - last, unit="nats")
    yield from losses(run)
    yield from gradient_norms(run)


def _resolution(context: CellContext, loss: float) -> float:
    """The smallest change of the loss that is no rounding: eight unit roundoffs of it.

    A forward pass carries a few roundings to the loss, and the loss itself is one; the root mean square of a decoder's
    block is 2.4 roundoffs, so rounding alone does not move a mean over many tokens by eight.
    """
    eps = torch.finfo(dtype_of(context.recipe.computes_in)).eps / 2
    return 8 * eps * max(abs(loss), 1.0)
