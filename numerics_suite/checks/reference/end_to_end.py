"""reference.end-to-end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.references import (
    is_reference_itself,
    longest_reduction,
    plain_answer,
    rounded_answer,
    rounding_allowance,
    routed_reason,
    routes,
    true_answer,
)
from numerics_suite.inputs.strategies import training_batch
from numerics_suite.observations.roundoff import rms

ENOUGH = 1000
"""Fewest numbers for a ratio of errors."""

LONGEST = 64
"""Most tokens of a row drawn for that purpose."""


@check(needs=("token-ids",))
def end_to_end(context: CellContext) -> Iterable[Measurement]:
    """Is the error against the true fp64 run no larger than the precision makes unavoidable?

    The kernel ratio is the model's error over that of the rounded run, in which every op is exact and rounded once.
    """
    if is_reference_itself(context):
        reason = "fp64 is the reference itself"
        raise NotApplicableError(reason)
    if routes(context.model):
        raise NotApplicableError(routed_reason())
    tensors = _batch(context)
    real = tensors["attention_mask"].bool()
    true = true_answer(context, tensors)[real]
    error = rms(plain_answer(context, tensors)[real] - true)
    inherent = rms(rounded_answer(context, tensors)[real] - true)
    ratio = error / inherent if inherent else float(error > 0) * float("inf") if error else 0.0
    allowance = rounding_allowance(context)
    yield Measurement(
        name="excess",
        value=ratio / allowance,
        unit="ratio",
        facts={
            "kernel ratio": ratio,
            "error against the true fp64 run (rms)": error,
            "inherent error of the precision (rms)": inherent,
            "longest sum in a matrix product": longest_reduction(context.model),
        },
    )
    yield Measurement(name="kernel-ratio", value=ratio, unit="ratio")
    yield Measurement(name="inherent-error", value=inherent, unit="")


def _batch(context: CellContext) -> Mapping[str, Any]:
    """The batch of gradients; one with more tokens if it is too small for a meaningful ratio of two errors.

    Both errors are draws. Of n numbers a root mean square strays by 1 / sqrt(2 n), so a thousand give the ratio to a
    few per cent. An output has no more independent numbers than the hidden state it is computed from.
    """
    batch = context.gradient_batch
    width = _free_width(context)
    if int(batch.tensors["attention_mask"].sum()) * width >= ENOUGH:
        return batch.tensors
    length = min(LONGEST, context.longest)
    rows = math.ceil(2 * ENOUGH / (width * length))  # rows but the first may be half as long
    if context.subject.task == "sequence-classification" and context.space.max_rows == 1:
        rows = 1  # without a pad token a classifier takes no more
    return training_batch(context.space, rows=rows, length=length, seed=context.request.seed).tensors


def _free_width(context: CellContext) -> int:
    """Independent numbers per token in the output that :func:`answer_of` compares."""
    hidden = int(context.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]
    if context.subject.task == "token-classification":
        return min(hidden, context.num_labels)
    return min(hidden, context.vocab_size) if context.subject.task == "causal-lm" else hidden
