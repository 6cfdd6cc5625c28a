"""reference.gradient."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.checks._true_gradient import GRADIENT, kept_run, require_sets, true_gradient
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.numbers import nan_last
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.devices.condition import dtype_of
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.layout import STATES, batch_first
from numerics_suite.engine.references import (
    is_reference_itself,
    refuse_without_ids,
    rounding_allowance,
    routed_reason,
    routes,
    trusted,
    turned_states,
)
from numerics_suite.engine.room import require_gradient_sets
from numerics_suite.engine.runner import Caller
from numerics_suite.observations.coarse_arithmetic import coarser_ops
from numerics_suite.observations.nondifferentiable import Kinks
from numerics_suite.observations.roundoff import rms, rms_difference


@check(trains=True, reads=(GRADIENT,))
def gradient(context: CellContext) -> Iterable[Measurement]:
    """Is every parameter's gradient as near to the true fp64 one as the precision allows?

    One backward pass on the training batch without loss scaling, per parameter against the rounded run's error.
    """
    if is_reference_itself(context):
        reason = "fp64 is the reference itself"
        raise NotApplicableError(reason)
    refuse_without_ids(context)
    if routes(context.model):
        raise NotApplicableError(routed_reason())
    # The rounded run's and the cell's own are held while the true ones come one by one.
    require_gradient_sets(context, 2 * dtype_of(context.recipe.parameters).itemsize / 8)
    tensors = context.gradient_batch.tensors
    call = differentiated(context)
    if not context.takes_ids and "loss" not in context.forward(context.gradient_batch):
        reason = "a plain module whose output has no loss"
        raise NotApplicableError(reason)
    rounded_run = context.runner.rounded(tensors, gradients=True, call=call)
    trusted(rounded_run.left_out)
    rounded = rounded_run.gradients or {}
    own: dict[str, Tensor] = {}
    kinks = Kinks()
    with kinks:
        yield _coarser(context, lambda: own.update(own_gradients(context, tensors)))
    ratios: dict[str, float] = {}
    missing: list[str] = []

    def take(name: str, wanted: Tensor) -> None:
        """Compare with a true gradient, which is then dropped where all of them do not fit."""
        if name not in own:
            missing.append(name)
        elif name in rounded and not kinks.found:
            ratios[name] = _ratio(own[name], wanted, rounded[name], context)

    _each_true(context, call, take)
    lost = tuple(missing)
    yield Measurement(name="lost", value=len(lost), unit="parameters", parameters=lost)
    if kinks.found:
        # Rounding that moves an activation over the kink switches its gradient on or off, by any amount.
        return
    if not ratios:
        reason = "the loss reaches no parameter"
        raise NotApplicableError(reason)
    worst = max(ratios, key=lambda name: nan_last(ratios[name]))
    allowance = rounding_allowance(context, tokens=int(tensors["input_ids"].numel()))
    yield Measurement(
        name="excess",
        value=ratios[worst] / allowance,
        unit="ratio",
        module=worst.rpartition(".")[0],
        parameters=(worst,),
        facts={"parameters compared": len(ratios)},
    )
    # NaN sorts nowhere; it is the worst parameter's business above.
    yield Measurement(
        name="median-excess",
        value=statistics.median(ratio for ratio in ratios.values() if ratio == ratio) / allowance
        if any(ratio == ratio for ratio in ratios.values())
        else float("nan"),
        unit="ratio",
    )


def _each_true(context: CellContext, call: Caller, take: Callable[[str, Tensor], None]) -> None:
    """Pass on each true fp64 gradient; where all of them do not fit beside what is held, as soon as it is complete."""
    try:
        require_sets(context, 1)
    except NotApplicableError:
        tensors = context.gradient_batch.tensors
        run = context.runner.true_fp64(tensors, gradients=True, call=call, stream=True, on_gradient=take)
        trusted(run.left_out)
        return
    for name, gradient in _true(context, call).items():
        take(name, gradient)


def _true(context: CellContext, call: Caller) -> Mapping[str, Tensor]:
    """The true fp64 gradients of the differentiated scalar: the loss, or a classifier's states."""
    if context.subject.task != "sequence-classification":
        return true_gradient(context).gradients

    def make() -> Mapping[str, Tensor]:
        run = context.runner.true_fp64(context.gradient_batch.tensors, gradients=True, call=call)
        trusted(run.left_out)
        return run.gradients or {}

    return kept_run(context, "states", make)


def _coarser(context: CellContext, run: Callable[[], object]) -> Measurement:
    """Ops of forward and backward pass in a coarser float: the rounded run has them too, so no ratio shows them."""
    found = coarser_ops(context.model, run, dtype_of(context.recipe.computes_in))
    return Measurement(
        name="coarser",
        value=sum(found.values()),
        unit="ops",
        module=next(iter(found)) or None if found else None,
        facts={"modules": ", ".join(name or "(model)" for name in list(found)[:5])} if found else {},
    )


def differentiated(context: CellContext) -> Caller:
    """Calls a model so that its output's `loss` is what the check differentiates.

    The loss, for a model with an output per token. A classifier's loss would propagate only a few numbers (rows ×
    labels): one draw of rounding error, by luck large or small, would be in every gradient, and where its softmax is
    nearly one-hot they are the remainder of 1 - 1. So the last hidden state of every real token is summed with
    alternating signs, which no rounding touches, and the logits likewise for the head; its loss is train.labels' and
    the oracle's to judge.
    """
    pooled = context.subject.task == "sequence-classification"
    turned = turned_states(context) if pooled else frozenset()

    def call(model: nn.Module, tensors: Mapping[str, Any]) -> Any:
        if not pooled:
            return call_model(model, tensors)
        output = call_model(model, tensors, output_hidden_states=True)
        states = batch_first(output["hidden_states"][-1], STATES, turned)
        states = states * tensors["attention_mask"].to(states.device).unsqueeze(-1)
        return {"loss": _alternating(output["logits"]) + _alternating(states)}

    return call


def _alternating(values: Tensor) -> Tensor:
    """The sum with alternating signs: a gradient of plus and minus one for every element."""
    signs = torch.ones_like(values, memory_format=torch.contiguous_format)
    signs.view(-1)[1::2] = -1
    return (values * signs).sum()


def own_gradients(context: CellContext, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of one backward pass in the cell's precision, by parameter name."""
    return context.runner.gradients(tensors, differentiated(context))


def _ratio(own: Tensor, true: Tensor, rounded: Tensor, context: CellContext) -> float:
    """Error of a gradient in units of the rounded run's, or of one roundoff of the gradient where that is larger."""
    roundoff = torch.finfo(dtype_of(context.recipe.computes_in)).eps / 2
    scale = max(rms_difference(rounded, true), roundoff * rms(true))
    error = rms_difference(own, true)
    if scale:
        return error / scale
    return 0.0 if error == 0 else float("inf")
