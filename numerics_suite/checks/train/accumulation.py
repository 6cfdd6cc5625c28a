"""train.accumulation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.checks._true_gradient import kept_run, true_gradient
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.numbers import nan_last
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.outputs import scalar_loss
from numerics_suite.engine.references import trusted
from numerics_suite.engine.router_loss import adds_router_loss, without_router_loss
from numerics_suite.engine.runner import Caller
from numerics_suite.engine.true_fp64 import Fp64Run
from numerics_suite.inputs.labels import IGNORED
from numerics_suite.observations.roundoff import gradient_errors, relative_error


@check(trains=True, needs=("token-ids",))
def accumulation(context: CellContext) -> Iterable[Measurement]:
    """Do micro-batches of unequal token counts, weighted by what they count, give the full batch's loss and gradient?

    In true fp64: a mean over labels is additive, so any difference is a loss or gradient that is not the mean's. The
    loss that balances a mixture's experts is no mean over labels, and is left out.
    """
    rows = int(context.gradient_batch.tensors["input_ids"].shape[0])
    if rows < 2:
        reason = "one row cannot be cut into micro-batches (--batch-size 1)"
        raise NotApplicableError(reason)
    # Only with a router's loss, switched off for this check alone, is the whole batch's gradient another than the cell's.
    full = None if adds_router_loss(context.model) else true_gradient(context).found
    with without_router_loss(context.model):
        full = full or _true(context)
        yield from _measured(full, kept_run(context, "micro-batches", lambda: _true(context, _in_parts(context, rows))))


def _measured(full: Fp64Run, parts: Fp64Run) -> Iterable[Measurement]:
    assert parts.gradients is not None
    assert full.gradients is not None
    sums = {name: parts.gradients.get(name, torch.zeros_like(value)) for name, value in full.gradients.items()}
    yield Measurement(
        name="true-loss",
        value=relative_error(parts.outputs["loss"].cpu(), full.outputs["loss"].cpu()),
        unit="ratio",
    )
    yield _worst(sums, full.gradients)


def _true(context: CellContext, call: Caller = call_model) -> Fp64Run:
    run = context.runner.true_fp64(context.gradient_batch.tensors, gradients=True, call=call)
    trusted(run.left_out)
    return run


def _in_parts(context: CellContext, rows: int) -> Caller:
    """Calls the model on micro-batches, whose losses are added up, each weighted by the labels that it counts.

    Their gradients add up in the parameters, as in a loop that accumulates.
    """
    task = context.subject.task

    def call(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        total, losses = counted(tensors["labels"], task), []
        # Unequal on purpose: one row, and the rest before it, so that dropout that is left on draws otherwise than for the
        # whole batch. The mean over no label is NaN by definition, and weighs nothing.
        for start, stop in ((1, rows), (0, 1)):
            part = {name: value[start:stop] for name, value in tensors.items()}
            if share := counted(part["labels"], task) / total:
                losses.append(share * scalar_loss(call_model(model, part)))
        return {"loss": torch.stack(losses).sum()}

    return call


def counted(labels: Tensor, task: str) -> int:
    """Labels that enter the mean: after the shift for language models, all rows of a sequence classifier."""
    if task == "sequence-classification":
        return int(labels.shape[0])
    kept = labels[:, 1:] if task == "causal-lm" else labels
    return int((kept != IGNORED).sum())


def _worst(found: dict[str, Any], wanted: dict[str, Any]) -> Measurement:
    errors = gradient_errors(found, wanted)
    worst = max(errors, key=lambda name: nan_last(errors[name]))
    return Measurement(
        name="true-gradient",
        value=errors[worst],
        unit="ratio",
        module=worst.rpartition(".")[0],
        parameters=(worst,),
    )
