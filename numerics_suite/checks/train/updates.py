"""train.updates."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.checks.train.grad_flow import dead_parameters
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.training_loop import TRAJECTORY


@check(trains=True, reads=(TRAJECTORY,))
def updates(context: CellContext) -> Iterable[Measurement]:
    """Does every trained parameter move, and as far as in float64?

    A parameter stays where it is if it gets no gradient, if no optimizer holds it, or if something writes its old value back; an exactly zero
    gradient is `train.grad-flow`'s. The change of the parameters is compared with the same steps in float64:
    :mod:`numerics_suite.engine.updates` has the formula and the limit. It needs no training step of its own.
    """
    run = context.trajectory
    if run.bad is not None:
        reason = "training met a non-finite value (train.finite)"
        raise NotApplicableError(reason)
    if len(run.gradient_norms) == run.skipped:
        reason = "the loss scaler skipped every step (train.amp)" if run.skipped else "no step was taken"
        raise NotApplicableError(reason)
    without = tuple(name for name in dead_parameters(context) if name in run.absent)
    still = (*without, *(name for name in run.unmoved if name not in without))
    yield Measurement(
        name="untrained",
        value=len(still),
        unit="parameters",
        module=still[0].rpartition(".")[0] if still else None,
        parameters=still,
        facts={"trained parameters": len(run.trained), "without any gradient": len(without)} if still else {},
    )
    worst = max(run.held, key=lambda held: held.roundoffs_lost, default=None)
    if worst is not None:
        facts = {**worst.facts, "learning rate": context.request.plan.lr}
        yield Measurement(name="lost", value=worst.roundoffs_lost, unit="roundoffs per share", facts=facts)
