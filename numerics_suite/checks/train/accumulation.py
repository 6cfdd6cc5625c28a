"""train.accumulation."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.checks._true_gradient import GRADIENT, kept_run, require_sets, true_gradient
from numerics_suite.checks.train._other_ways import Difference, agreement, difference, in_parts
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.references import trusted
from numerics_suite.engine.router_loss import adds_router_loss, without_router_loss
from numerics_suite.engine.runner import Caller
from numerics_suite.engine.true_fp64 import Fp64Run


@check(trains=True, needs=("token-ids",), reads=(GRADIENT,))
def accumulation(context: CellContext) -> Iterable[Measurement]:
    """Do micro-batches of unequal token counts, weighted by their labels, give the full batch's loss and gradient?

    In true fp64: a mean over labels is additive, so any difference is a loss or gradient that is not the mean's. A
    mixture of experts' balancing loss is no mean over labels and is left out.
    """
    rows = int(context.gradient_batch.tensors["input_ids"].shape[0])
    if rows < 2:
        reason = "one row cannot be cut into micro-batches (--batch-size 1)"
        raise NotApplicableError(reason)
    require_sets(context, 1)
    found = agreement(context) or _of_parts_alone(context, rows)
    yield Measurement(name="true-loss", value=found.loss, unit="ratio")
    yield Measurement(
        name="true-gradient",
        value=found.gradient,
        unit="ratio",
        module=found.parameter.rpartition(".")[0],
        parameters=(found.parameter,),
    )


def _of_parts_alone(context: CellContext, rows: int) -> Difference:
    require_sets(context, 2)
    # Only with a router's loss, switched off for this check alone, is the whole batch's gradient another than the cell's.
    full = None if adds_router_loss(context.model) else true_gradient(context).found
    with without_router_loss(context.model):
        full = full or _true(context)
        return difference(kept_run(context, "micro-batches", lambda: _true(context, in_parts(context, rows))), full)


def _true(context: CellContext, call: Caller = call_model) -> Fp64Run:
    run = context.runner.true_fp64(context.gradient_batch.tensors, gradients=True, call=call)
    trusted(run.left_out)
    return run
