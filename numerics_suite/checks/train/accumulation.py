"""train.accumulation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.numbers import nan_last
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.evidence import Evidence
from numerics_suite.engine.references import trusted
from numerics_suite.engine.router_loss import without_router_loss
from numerics_suite.inputs.labels import IGNORED
from numerics_suite.observing.roundoff import gradient_errors, relative_error


@check(trains=True, needs=("token-ids",))
def accumulation(evidence: Evidence) -> Iterable[Measurement]:
    """Do micro-batches of unequal token counts, weighted by what they count, give the full batch's loss and gradient?

    In true fp64: a mean over labels is additive, so any difference is a loss or gradient that is not the mean's. The
    loss that balances a mixture's experts is no mean over labels, and is left out.
    """
    with without_router_loss(evidence.model):
        yield from _measured(evidence)


def _measured(evidence: Evidence) -> Iterable[Measurement]:
    tensors = evidence.training_batch.tensors
    rows = int(tensors["input_ids"].shape[0])
    if rows < 2:
        reason = "one row cannot be cut into micro-batches (--batch-size 1)"
        raise NotApplicableError(reason)
    total = counted(tensors["labels"], evidence.subject.task)
    loss, sums = 0.0, dict[str, Tensor]()
    # Unequal on purpose: one row, then the rest. Each run's gradients are dropped before the next run makes its own.
    for start, stop in ((0, 1), (1, rows)):
        part = {name: value[start:stop] for name, value in tensors.items()}
        share = counted(part["labels"], evidence.subject.task) / total
        if share:
            loss += share * _add_gradients(evidence, part, share, sums)
    full = evidence.runner.true_fp64(tensors, gradients=True)
    trusted(full.left_out)
    assert full.gradients is not None
    sums = {name: sums.get(name, torch.zeros_like(value)) for name, value in full.gradients.items()}
    yield Measurement(
        name="true-loss",
        value=relative_error(torch.tensor(loss, dtype=torch.float64), full.outputs["loss"].cpu()),
        unit="ratio",
    )
    yield _worst(sums, full.gradients)


def _add_gradients(evidence: Evidence, part: dict[str, Tensor], share: float, sums: dict[str, Tensor]) -> float:
    """Add the share of a micro-batch's gradients to `sums`; returns its loss."""
    run = evidence.runner.true_fp64(part, gradients=True)
    trusted(run.left_out)
    for name, value in (run.gradients or {}).items():
        if name in sums:
            sums[name].add_(value, alpha=share)
        else:
            sums[name] = value.mul_(share)
    return float(run.outputs["loss"])


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
