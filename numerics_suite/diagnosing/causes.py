"""Which cause a value that is not finite has: told from where it first appears.

The decisive fact of each cause: a parameter that is not finite itself (nobody wrote it, or the file is damaged) ·
a softmax over a row with no finite score (fully masked) · an infinity from finite inputs (overflow: the dtype's range
ends) · a NaN from finite inputs (0/0 and its like: invalid operation) · an optimizer whose eps is 0 in its dtype.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.judging.verdicts import Breach
from numerics_suite.observing.locate import Origin, find_origin
from numerics_suite.running.forward import (
    arithmetic,
    backward_arithmetic,
    call_model,
    dtype_of,
    floating_outputs,
    main_output,
    to_device,
)
from numerics_suite.running.training import OPTIMIZERS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numerics_suite.core.records import Batch, Fact
    from numerics_suite.running.evidence import Evidence

LOCATED = {
    ("forward.finite", "non-finite"),
    ("forward.headroom", "non-finite"),
    ("train.finite", "non-finite"),
    ("train.clip", "saved-by-clipping"),
    ("train.amp", "skipped-forever"),
}
POLES = frozenset({"rsqrt", "reciprocal", "div", "log", "log2", "log10", "log1p", "logit"})
"""Ops that are infinite at a point of their domain, whatever the range of the dtype."""

REMEDIES = {
    "uninitialised-parameters": ("init-head", "newer-version"),
    "corrupt-weights": ("reload-weights",),
    "fully-masked-row": ("fix-padding", "eager-attention", "newer-version"),
    "overflow": ("keep-in-fp32", "use-amp-bf16", "clip-grad-norm"),
    "optimizer-underflow": ("larger-optimizer-eps", "use-amp-bf16"),
    "invalid-operation": ("keep-in-fp32", "eager-attention", "newer-version"),
    "divergence": ("clip-grad-norm", "lower-learning-rate"),
    "loss-scaling": ("tune-loss-scale", "disable-amp", "use-amp-bf16"),
}


def with_cause(breach: Breach, evidence: Evidence, batch: Batch | None) -> Breach:
    """The breach with cause, module, op and source as a replay shows them; unchanged where no replay applies.

    Args:
        breach: a breach of one of :data:`LOCATED`.
        evidence: the cell; its model is replayed, not changed.
        batch: the smallest failing batch, None for training.
    """
    key = (breach.budget.check, breach.measurement.name)
    if key not in LOCATED or breach.measurement.cause is not None:
        return breach
    training = key[0].startswith("train.")
    if training and _optimizer_underflows(evidence):
        return _named(breach, "optimizer-underflow", facts={"eps in the parameters' dtype": 0.0})
    origin = _replay_training(evidence) if training else _replay_forward(evidence, batch)
    if origin is None:
        cause = breach.budget.cause
        if training and evidence.trajectory.bad is not None and evidence.trajectory.bad.step > 1:
            cause = "divergence"
        return _named(breach, cause)
    cause = _cause_of(origin, evidence)
    if key[0] == "train.amp" and cause not in {"uninitialised-parameters", "corrupt-weights"}:
        # Where the gradient breaks is told beside it; what the user sees, and can turn, is the scale that never recovers.
        return _at(breach, origin, breach.budget.cause, facts={"the gradient breaks by": cause})
    return _at(breach, origin, cause)


def _replay_forward(evidence: Evidence, batch: Batch | None) -> Origin | None:
    if batch is None:
        return None
    tensors = evidence.inputs_of(batch)
    return find_origin(evidence.model, lambda: evidence.run(tensors))


def _replay_training(evidence: Evidence) -> Origin | None:
    """Forward and backward of the first step; later steps start from parameters that training itself made."""
    model = evidence.copy_model()
    tensors = to_device(evidence.training_batch.tensors, evidence.cell.device)

    def run() -> None:
        with arithmetic(evidence.recipe, evidence.cell.device):
            outputs = floating_outputs(call_model(model, tensors))
        loss = outputs.get("loss")
        with backward_arithmetic(evidence.recipe):
            (main_output(outputs)[1].float().square().mean() if loss is None else loss).backward()  # type: ignore[no-untyped-call]

    try:
        return find_origin(model, run)
    except (RuntimeError, NotApplicableError):
        return None


def _optimizer_underflows(evidence: Evidence) -> bool:
    """Gradients were finite, the step made NaN, and the optimizer's eps is 0 in the parameters' dtype."""
    bad = evidence.trajectory.bad
    name = evidence.request.plan.optimizer
    if bad is None or bad.kind not in {"parameter", "optimizer state"} or name == "sgd":
        return False
    eps = evidence.request.plan.eps
    if eps is None:
        eps = OPTIMIZERS[name]([torch.nn.Parameter(torch.zeros(1))]).defaults["eps"]
    return float(torch.tensor(eps, dtype=dtype_of(evidence.recipe.parameters))) == 0.0


def _cause_of(origin: Origin, evidence: Evidence) -> str:
    if origin.parameters:
        unwritten = set(origin.parameters) & set(evidence.unwritten)
        return "uninitialised-parameters" if unwritten else "corrupt-weights"
    if origin.masked_row:
        return "fully-masked-row"
    if origin.outside_domain:
        return "invalid-operation"
    # One over zero is infinite in every dtype: no wider range would help.
    return "overflow" if origin.has_infinity and _name(origin.op) not in POLES else "invalid-operation"


def _name(op: str) -> str:
    """`rsqrt` of `aten.rsqrt` or `aten.rsqrt.default`."""
    return op.split(".")[1] if "." in op else op


def _at(breach: Breach, origin: Origin, cause: str, facts: Mapping[str, Fact] | None = None) -> Breach:
    facts = {
        **(facts or {}),
        "op": origin.op,
        "dtype": origin.dtype,
        "largest finite input": origin.largest_input,
        "largest number of the dtype": float(torch.finfo(dtype_of(origin.dtype)).max),
        "share not finite": origin.nonfinite / max(origin.elements, 1),
        "pass": "backward" if origin.backward else "forward",
    }
    named = _named(breach, cause, facts=facts)
    measurement = replace(
        named.measurement,
        module=origin.module or breach.measurement.module,
        op=origin.op,
        source=origin.source,
        parameters=origin.parameters or breach.measurement.parameters,
    )
    return Breach(measurement=measurement, budget=named.budget)


def _named(breach: Breach, cause: str, facts: Mapping[str, Fact] | None = None) -> Breach:
    measurement = replace(breach.measurement, cause=cause, facts={**breach.measurement.facts, **(facts or {})})
    remedies = REMEDIES.get(cause, breach.budget.remedies)
    return Breach(measurement=measurement, budget=replace(breach.budget, remedies=remedies))
