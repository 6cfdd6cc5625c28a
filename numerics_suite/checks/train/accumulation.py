"""train.accumulation."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.checks._true_gradient import GRADIENT, kept_run, true_gradient
from numerics_suite.checks.train._other_ways import Difference, agreement, difference, in_parts
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.evidence import Evidence
from numerics_suite.engine.references import trusted
from numerics_suite.engine.router_loss import adds_router_loss, without_router_loss
from numerics_suite.engine.runner import Caller
from numerics_suite.engine.true_fp64 import Fp64Run


@check(trains=True, needs=("token-ids",), reads=(GRADIENT,))
def accumulation(evidence: Evidence) -> Iterable[Measurement]:
    """Do micro-batches of unequal token counts, weighted by what they count, give the full batch's loss and gradient?

    In true fp64: a mean over labels is additive, so any difference is a loss or gradient that is not the mean's. The
    loss that balances a mixture's experts is no mean over labels, and is left out.
    """
    rows = int(evidence.gradient_batch.tensors["input_ids"].shape[0])
    if rows < 2:
        reason = "one row cannot be cut into micro-batches (--batch-size 1)"
        raise NotApplicableError(reason)
    found = agreement(evidence) or _of_parts_alone(evidence, rows)
    yield Measurement(name="true-loss", value=found.loss, unit="ratio")
    yield Measurement(
        name="true-gradient",
        value=found.gradient,
        unit="ratio",
        module=found.parameter.rpartition(".")[0],
        parameters=(found.parameter,),
    )


def _of_parts_alone(evidence: Evidence, rows: int) -> Difference:
    # Only with a router's loss, switched off for this check alone, is the whole batch's gradient another than the cell's.
    full = None if adds_router_loss(evidence.model) else true_gradient(evidence).found
    with without_router_loss(evidence.model):
        full = full or _true(evidence)
        return difference(kept_run(evidence, "micro-batches", lambda: _true(evidence, in_parts(evidence, rows))), full)


def _true(evidence: Evidence, call: Caller = call_model) -> Fp64Run:
    run = evidence.runner.true_fp64(evidence.gradient_batch.tensors, gradients=True, call=call)
    trusted(run.left_out)
    return run
