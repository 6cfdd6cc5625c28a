"""Training on the stored batch: a few optimizer steps in the cell's precision and the same in true fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from numerics_suite.baselines.checkpointing import checkpointed
from numerics_suite.baselines.records import TrainingCurve
from numerics_suite.baselines.trace import Trace, trace_call
from numerics_suite.devices import random_state
from numerics_suite.devices.precisions import SERVING_REASON
from numerics_suite.engine import reference_ops
from numerics_suite.engine.blocks import freeze_to_scope
from numerics_suite.engine.calls import where_float64_is
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.references import no_reference
from numerics_suite.engine.training_loop import TrainingPlan, make_optimizer, train
from numerics_suite.engine.true_fp64 import run_true_fp64

LARGE: Final = 10**9
"""Parameters above which the head and the last block alone are trained."""

QUANTISED = "a quantised checkpoint is not trained"


def scope_of(model: nn.Module) -> str:
    """What is trained, whatever memory this machine has: two machines' baselines must be of the same thing."""
    return "last:1" if sum(p.numel() for p in model.parameters()) > LARGE else "full"


def why_untrained(context: CellContext, found: Trace) -> str:
    """Why the cell has no curve and no gradients in its precision; empty where it has them."""
    if context.subject.quantized:
        return QUANTISED
    if not context.recipe.trains:
        return SERVING_REASON
    return found.no_gradients


def training_curve(context: CellContext, tensors: Mapping[str, Any], found: Trace) -> TrainingCurve:
    """The curve of the cell, or why it has none."""
    scope = scope_of(context.model)
    reason = why_untrained(context, found)
    if reason:
        return TrainingCurve(scope=scope, reason=reason)
    plan = replace(context.request.plan, scope=scope)
    dtype = torch.float64 if context.recipe.parameters == "float64" else None
    with trainable(context, scope, dtype) as model, random_state.torch_seeded(context.request.seed):
        seen = train(model, tensors, condition=context.condition, plan=plan)
    true_losses, true_norms, left_out = _true_curve(context, tensors, plan)
    if left_out:
        reason = no_reference(left_out)
    return TrainingCurve(
        losses=_filled(seen.losses, plan.steps + 1),
        norms=_filled(seen.gradient_norms, plan.steps),
        true_losses=() if left_out else true_losses,
        true_norms=() if left_out else true_norms,
        scope=scope,
        reason=reason,
    )


def _filled(numbers: tuple[float, ...], count: int) -> tuple[float, ...]:
    """What a run that met a NaN did not come to is NaN."""
    return (*numbers, *[math.nan] * (count - len(numbers)))[:count]


@contextmanager
def trainable(
    context: CellContext, scope: str, dtype: torch.dtype | None = None, model: nn.Module | None = None
) -> Iterator[nn.Module]:
    """The cell's model with trained parameters of its own; what the scope leaves out is shared, and nothing is changed.

    Args:
        context: of the cell.
        scope: of :func:`scope_of`.
        dtype: of the trained parameters, None as they are.
        model: a copy of the cell's model in its place.
    """
    model = context.model if model is None else model
    with (
        reference_ops.preserved(model),
        reference_ops.replaced_parameters(model, _alias) as parameters,
    ):
        freeze_to_scope(model, scope, context.family)
        for parameter in parameters.values():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype or parameter.dtype, copy=True)
        yield model


def _alias(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


def _true_curve(
    context: CellContext, tensors: Mapping[str, Any], plan: TrainingPlan
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[str, ...]]:
    """Losses, norms, and what could not be lifted: gradients of true fp64 runs, and the optimizer's steps in float64.

    In training mode with activation checkpointing, which change nothing in a right model.
    """
    losses, norms = [], []
    left_out: tuple[str, ...] = ()
    with trainable(context, plan.scope, torch.float64, where_float64_is(context.model)) as model:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = make_optimizer(plan, trained.values())
        for _ in range(plan.steps):
            with checkpointed(model) as in_training:
                loss, gradients, left_out = _true_gradients(model, in_training(trace_call(context, loss=True)), tensors)
            losses.append(loss)
            for name, parameter in trained.items():
                parameter.grad = gradients.get(name)
            norms.append(float(torch.nn.utils.get_total_norm(list(gradients.values()))))
            if plan.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(list(trained.values()), plan.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        last = run_true_fp64(model, tensors, call=trace_call(context, loss=True))
        losses.append(float(last.outputs["loss"]))
    return tuple(losses), tuple(norms), left_out


def _true_gradients(
    model: nn.Module, call: Callable[[nn.Module, Mapping[str, Any]], object], tensors: Mapping[str, Any]
) -> tuple[float, dict[str, Tensor], tuple[str, ...]]:
    run = run_true_fp64(model, tensors, gradients=True, call=call)
    return float(run.outputs["loss"]), dict(run.gradients or {}), run.left_out
