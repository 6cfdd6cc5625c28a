"""reference.end-to-end."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.running.evidence import Evidence
from numerics_suite.running.twins import (
    is_reference_itself,
    longest_reduction,
    plain_answer,
    root_mean_square,
    rounded_answer,
    rounding_allowance,
    true_answer,
)


@check(needs=("token-ids",))
def end_to_end(evidence: Evidence) -> Iterable[Measurement]:
    """Is the error against the true fp64 run what the precision makes unavoidable?

    The kernel ratio is the model's error over that of the rounded run, in which every op is perfect and rounded once.
    """
    if is_reference_itself(evidence):
        reason = "fp64 is the reference itself"
        raise NotApplicableError(reason)
    tensors = evidence.training_batch.tensors
    real = tensors["attention_mask"].bool()
    true = true_answer(evidence, tensors)[real]
    error = root_mean_square(plain_answer(evidence, tensors)[real] - true)
    inherent = root_mean_square(rounded_answer(evidence, tensors)[real] - true)
    ratio = error / inherent if inherent else float(error > 0) * float("inf") if error else 0.0
    allowance = rounding_allowance(evidence)
    yield Measurement(
        name="excess",
        value=ratio / allowance,
        unit="ratio",
        facts={
            "kernel ratio": ratio,
            "error against the true fp64 run (rms)": error,
            "inherent error of the precision (rms)": inherent,
            "longest sum in a matrix product": longest_reduction(evidence.model),
        },
    )
    yield Measurement(name="kernel-ratio", value=ratio, unit="ratio")
    yield Measurement(name="inherent-error", value=inherent, unit="")
