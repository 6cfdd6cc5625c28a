"""Which cause a value that is not finite has, from where it first appears: for a cell and for a step that the watch caught.

The decisive fact of each cause: a parameter that is not finite itself (uninitialised, or the file is damaged) ·
a softmax over a row with no finite score (fully masked) · an infinity from finite inputs (overflow: the dtype's range
ends) · a NaN from finite inputs (0/0 and its like: invalid operation) · an optimizer whose eps is 0 in its dtype.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from numerics_suite.core.errors import NotApplicableError, NumericsSuiteError
from numerics_suite.devices.condition import dtype_of
from numerics_suite.devices.random_state import seeded
from numerics_suite.diagnosis.copies import discard
from numerics_suite.engine.outputs import floating_outputs
from numerics_suite.engine.training_loop import BadTensor, HaltedError, Trainer, TrainingPlan
from numerics_suite.inputs.labels import no_label_counts, predicts_next_token
from numerics_suite.judgement.verdicts import Breach
from numerics_suite.observations.bad_value_location import Origin, find_origin
from numerics_suite.observations.domain import name_of
from numerics_suite.observations.finiteness import nonfinite_count

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numerics_suite.core.records import Batch, Fact
    from numerics_suite.engine.cell_context import CellContext

LOCATED = {
    ("forward.finite", "non-finite"),
    ("forward.headroom", "non-finite"),
    ("train.finite", "non-finite"),
    ("train.clip", "saved-by-clipping"),
    ("train.amp", "skipped-forever"),
}
POLES = frozenset({"rsqrt", "reciprocal", "div", "log", "log2", "log10", "log1p", "logit"})
"""Ops that are infinite at a point of their domain, whatever the range of the dtype."""

SLOWER = 100.0
"""Steps that much smaller decide whether a run that broke later was driven there by its own steps."""

USUAL = TrainingPlan().lr
"""A learning rate at which a sound model trains, asked where a hundredth of the one in use is still far above it."""

REMEDIES = {
    "uninitialised-parameters": ("init-head", "newer-version"),
    "corrupt-weights": ("reload-weights",),
    "fully-masked-row": ("fix-padding", "eager-attention", "newer-version"),
    "overflow": ("keep-in-fp32", "use-amp-bf16", "clip-grad-norm"),
    "optimizer-underflow": ("larger-optimizer-eps", "use-amp-bf16"),
    "invalid-operation": ("keep-in-fp32", "eager-attention", "newer-version"),
    "divergence": ("clip-grad-norm", "lower-learning-rate"),
    "underflow": ("keep-in-fp32", "use-amp-bf16", "newer-version"),
    "loss-scaling": ("tune-loss-scale", "disable-amp", "use-amp-bf16"),
    "wrong-input-dtype": ("default-input-dtypes",),
    "out-of-range-input": (),
    "no-counted-labels": ("count-labels",),
    "dead-gradient": (),
    "untrained-parameters": ("non-reentrant-checkpointing", "rebuild-optimizer"),
    "rounded-update": ("raise-learning-rate", "stochastic-rounding", "fp32-master-weights", "use-amp-bf16"),
}


def with_cause(breach: Breach, context: CellContext, batch: Batch | None) -> Breach:
    """The breach with cause, module, op and source as a replay shows them; unchanged where no replay applies.

    Args:
        breach: a breach of one of :data:`LOCATED`.
        context: the cell; its model is replayed, not changed.
        batch: the smallest failing batch, None for training.
    """
    key = (breach.budget.check, breach.measurement.name)
    if breach.measurement.cause is not None:
        return breach
    if key not in LOCATED:
        return _with_cause_of_nan(breach, context, batch)
    return _with_bad_input(breach, context, batch) or _with_place(breach, context, batch)


def _with_bad_input(breach: Breach, context: CellContext, batch: Batch | None) -> Breach | None:
    given = batch or (context.training_batch if breach.budget.check.startswith("train.") else None)
    name = None if given is None or context.broken else bad_input(given.tensors)
    if name is not None:
        return _named(breach, "out-of-range-input", facts={"input that is not finite": name})
    if given is None or not breach.budget.check.startswith("train.") or context.broken:
        return None
    if no_label_counts(given.tensors, shifted=predicts_next_token(context.model)):
        return _named(breach, "no-counted-labels", facts={"labels that count": 0})
    return None


def _with_place(breach: Breach, context: CellContext, batch: Batch | None) -> Breach:
    key = (breach.budget.check, breach.measurement.name)
    if not key[0].startswith("train."):
        origin = _replay_forward(context, batch)
        return (
            _named(breach, breach.budget.cause)
            if origin is None
            else _at(breach, origin, _forward_cause(origin, context, batch))
        )
    plan, bad = _failing_run(breach, context)
    origin, cause = cause_of_run(context, plan, bad)
    if cause is None:
        late = bad is not None and bad.step > context.first_step
        cause = "divergence" if late else breach.budget.cause
    if origin is None:
        return _named(breach, cause)
    if key[0] == "train.amp" and cause not in {"uninitialised-parameters", "corrupt-weights"}:
        # The evidence holds where the gradient breaks; what the user sees, and can turn, is the scale that never recovers.
        return _at(breach, origin, breach.budget.cause, known={"the gradient breaks by": cause})
    return _at(breach, origin, cause)


def bad_input(tensors: Mapping[str, object]) -> str | None:
    """Name of the first input that holds NaN or +inf; a mask's -inf is meant."""
    for name, value in tensors.items():
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        if floating and bool((value.isnan() | (value == float("inf"))).any()):  # type: ignore[attr-defined]
            return name
    return None


def _with_cause_of_nan(breach: Breach, context: CellContext, batch: Batch | None) -> Breach:
    """A comparison that came out as NaN shows nothing about a law or a rounding: the finding gives the NaN's own cause, where it is found."""
    compares = breach.budget.check.startswith(("forward.", "reference.", "train."))
    if not compares or breach.measurement.value == breach.measurement.value:
        return breach
    batch = batch if batch is not None else context.training_batch
    origin = _replay_forward(context, batch)
    if origin is not None:
        return _at(breach, origin, _forward_cause(origin, context, batch))
    if not context.recipe.trains:
        return breach
    origin, cause = cause_of_run(context, context.request.plan, None)
    return breach if origin is None or cause is None else _at(breach, origin, cause)


def _replay_forward(context: CellContext, batch: Batch | None) -> Origin | None:
    if batch is None:
        return None
    tensors = context.inputs_of(batch)
    return find_origin(context.model, lambda: floating_outputs(context.run(tensors)))


def _failing_run(breach: Breach, context: CellContext) -> tuple[TrainingPlan, BadTensor | None]:
    """How the failing run was trained, and the first tensor that was not finite in it."""
    plan = context.request.plan
    if breach.budget.check == "train.amp":
        # A scale of 65,536 may overflow on its way down; what breaks the gradient at the last one breaks it at every scale.
        scale = breach.measurement.facts.get("loss scale")
        return (replace(plan, init_scale=float(scale)) if isinstance(scale, float) and scale > 0 else plan), None
    return plan, context.trajectory.bad


def cause_of_run(context: CellContext, plan: TrainingPlan, bad: BadTensor | None) -> tuple[Origin | None, str | None]:
    """Where a value stops being finite in a training run and why; None for what the run does not show.

    The steps before the failing one are repeated unwatched, on a copy.

    Args:
        context: a cell, or a step that the watch caught.
        plan: of the run that failed.
        bad: the first tensor that was not finite, None for whatever the first step leaves.
    """
    try:
        trainer = context.trainer(plan)
        with seeded(context.request.seed):
            origin = _origin_in(trainer, context.first_step if bad is None else bad.step, bad)
    except (RuntimeError, NotApplicableError, HaltedError):
        return None, None
    if origin is not None and origin.parameters:
        return origin, parameter_cause(origin.parameters, context)
    in_optimizer = bad is not None and bad.kind in {"parameter", "optimizer state"}
    in_optimizer = in_optimizer or (origin is not None and origin.written is not None)
    if in_optimizer and _divides_by_eps(origin) and eps_underflows(trainer.optimizers):
        return origin, "optimizer-underflow"
    moved = bad is not None and (bad.step > context.first_step or in_optimizer)
    masked = origin is not None and origin.masked_row
    if moved and not masked and _slower_is_finite(context, plan):
        return origin, "divergence"  # the model was well until its own steps moved it, and smaller ones do not
    return origin, None if origin is None else cause_of(origin)


def _origin_in(trainer: Trainer, step: int, bad: BadTensor | None) -> Origin | None:
    def last() -> object:
        if bad is not None and bad.kind in {"logits", "loss"}:
            outputs = [run() for run in trainer.forwards(step)]
            return outputs, [trainer.loss_of(output) for output in outputs]
        with contextlib.suppress(HaltedError):
            trainer.step(step)
        kept = dict(trainer.parameters)
        return [each.state for each in trainer.optimizers], kept, [p.grad for p in kept.values()]

    for number in trainer.numbers():
        if number == step:
            break
        trainer.step(number)
    return find_origin(trainer.model, last)


def _divides_by_eps(origin: Origin | None) -> bool:
    """Whether the op may be the optimizer's division; a fused kernel shows no division of its own."""
    return origin is None or origin.outside_domain or "fused" in origin.op


def parameter_cause(parameters: Iterable[str], context: CellContext) -> str:
    """The cause of parameters that are not finite themselves."""
    return "uninitialised-parameters" if set(parameters) & set(context.unwritten) else "corrupt-weights"


def cause_of(origin: Origin) -> str:
    """What the op itself shows: `corrupt-weights` stands for any parameter that is not finite."""
    if origin.parameters:
        return "corrupt-weights"
    if origin.masked_row:
        return "fully-masked-row"
    if origin.finite_in_fp64:
        return "overflow"  # the same op on the same inputs: only the range of its dtype ended
    if origin.outside_domain:
        return "invalid-operation"
    # One over zero is infinite in every dtype: no wider range would help.
    return "overflow" if origin.has_infinity and name_of(origin.op) not in POLES else "invalid-operation"


def _forward_cause(origin: Origin, context: CellContext, batch: Batch | None) -> str:
    cause = cause_of(origin)
    if origin.parameters:
        return parameter_cause(origin.parameters, context)
    if origin.outside_domain and cause == "invalid-operation" and batch is not None and _finite_in_fp32(context, batch):
        return "underflow"  # the zero that it divides by is one in this dtype only
    return cause


def _finite_in_fp32(context: CellContext, batch: Batch) -> bool:
    """The same batch through the model in float32; False where it is in float32 already."""
    if context.recipe.computes_in not in {"float16", "bfloat16"}:
        return False
    wider = context.variant(precision_name="fp32")
    try:
        outputs = wider.forward(batch)
    except (RuntimeError, NumericsSuiteError):
        return False
    finally:
        discard(wider)
    return not any(nonfinite_count(value) for value in outputs.values())


def _slower_is_finite(context: CellContext, plan: TrainingPlan) -> bool:
    rates = (plan.lr / SLOWER, *((USUAL,) if plan.lr / SLOWER > USUAL else ()))
    try:
        return any(context.train(replace(plan, lr=lr)).bad is None for lr in rates)
    except (RuntimeError, NumericsSuiteError):
        return False


def eps_underflows(optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Whether an eps is 0 in the dtype of a parameter, so that the optimizer divides by the root of an average that may be 0."""
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        eps = group.get("eps")
        dtypes = {p.dtype for p in group["params"] if p.is_floating_point()}
        if isinstance(eps, float) and eps and any(float(torch.tensor(eps, dtype=dtype)) == 0.0 for dtype in dtypes):
            return True
    return False


def origin_facts(origin: Origin) -> dict[str, Fact]:
    """The numbers around an origin, for a finding's evidence."""
    facts: dict[str, Fact] = {
        "op": origin.op,
        "dtype": origin.dtype,
        "largest finite input": origin.largest_input,
        "largest number of the dtype": float(torch.finfo(dtype_of(origin.dtype)).max),
        "share not finite": origin.nonfinite / max(origin.elements, 1),
        "inputs": origin.inputs,
        "pass": "optimizer" if origin.written else "backward" if origin.backward else "forward",
    }
    if origin.node is not None:
        facts["autograd node"] = origin.node
    if origin.finite_in_fp64 is not None:
        facts["the same op in float64"] = "finite" if origin.finite_in_fp64 else "not finite"
    return facts


def _at(breach: Breach, origin: Origin, cause: str, known: Mapping[str, Fact] | None = None) -> Breach:
    named = _named(breach, cause, facts={**(known or {}), **origin_facts(origin)})
    measurement = replace(
        named.measurement,
        module=origin.module,
        op=origin.op,
        source=origin.source,
        parameters=origin.parameters or ((origin.written,) if origin.written else breach.measurement.parameters),
    )
    return Breach(measurement=measurement, budget=named.budget)


def _named(breach: Breach, cause: str, facts: Mapping[str, Fact] | None = None) -> Breach:
    measurement = replace(breach.measurement, cause=cause, facts={**breach.measurement.facts, **(facts or {})})
    remedies = REMEDIES.get(cause, breach.budget.remedies)
    return Breach(measurement=measurement, budget=replace(breach.budget, remedies=remedies))
