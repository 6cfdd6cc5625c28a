"""The whole batch's gradient, taken in all ways at once that must not change it; one by one only if it differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.checks._true_gradient import require_sets, true_gradient
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.exact import AGREED
from numerics_suite.core.numbers import nan_last
from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.digests import batch_key
from numerics_suite.engine.dropout import WithoutDropout
from numerics_suite.engine.outputs import scalar_loss
from numerics_suite.engine.router_loss import adds_router_loss
from numerics_suite.engine.runner import Caller
from numerics_suite.engine.true_fp64 import Fp64Run
from numerics_suite.inputs.labels import labels_in_mean
from numerics_suite.observations.roundoff import GradientComparison, filled, gradient_errors, relative_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far a run is from the cell's own true fp64 run of the same batch.

    Attributes:
        loss: relative difference of the losses.
        gradient: the largest relative difference of a parameter's gradient; infinite if one is missing.
        parameter: the one with that difference.
    """

    loss: float
    gradient: float
    parameter: str


def agreement(context: CellContext) -> Difference | None:
    """By how much micro-batches, training mode and activation checkpointing, all at once, change loss and gradient in true fp64.

    One run instead of three: changes would have to cancel to ten digits in every parameter to stay hidden.
    None if there is a difference, or the three cannot be combined: then each check tries its own way alone.
    """
    rows = int(context.gradient_batch.tensors["input_ids"].shape[0])
    supported = getattr(context.model, "supports_gradient_checkpointing", False)
    if rows < 2 or not supported or adds_router_loss(context.model):
        return None
    key = f"micro-batches, checkpointed, in training mode over {batch_key(context.gradient_batch.tensors)}"
    found: Difference | None = context.true_passes.run(key, lambda: _agreement(context, rows))
    return found


def _agreement(context: CellContext, rows: int) -> Difference | None:
    parts = in_training_mode(in_parts(context, rows), checkpointed=True)
    try:
        run, whole, compared = _compared(context, parts)
    except NotApplicableError:
        return None
    except Exception as error:  # noqa: BLE001 - the check of that way reports the model's exceptions
        reraise_if_fatal(error)
        return None
    if run.left_out or whole.left_out or compared.lost:
        return None
    found = _difference(run, whole, compared.errors())
    return found if max(found.loss, found.gradient) <= AGREED else None


def _compared(context: CellContext, parts: Caller) -> tuple[Fp64Run, Fp64Run, GradientComparison]:
    """The run in parts, that of the whole batch, and the gradients of the one beside those of the other.

    Gradients of the part whose backward pass comes first are held until the other part's are added: beside the whole batch's
    that is a second set. Where there is no room for it the sums are held alone, and the whole batch's come again one by one.
    """
    tensors, compared = context.gradient_batch.tensors, GradientComparison()
    try:
        require_sets(context, 2)
    except NotApplicableError:
        context.gradient_passes.clear()
        run = context.runner.true_fp64(tensors, gradients=True, call=parts)
        sums = dict(run.gradients or {})

        def compare(name: str, gradient: Tensor) -> None:
            compared.add(name, sums.pop(name), gradient)

        whole = context.runner.true_fp64(tensors, gradients=True, stream=True, on_gradient=compare)
        compared.lost.extend(sums)
        return run, whole, compared
    held = true_gradient(context)
    left = dict(held.gradients)

    def take(name: str, gradient: Tensor) -> None:
        compared.add(name, gradient, left.pop(name))

    run = context.runner.true_fp64(tensors, gradients=True, call=parts, on_gradient=take)
    for name, gradient in (run.gradients or {}).items():
        take(name, gradient)
    compared.lost.extend(left)
    return run, held.found, compared


def difference(run: Fp64Run, whole: Fp64Run) -> Difference:
    """How far a run's loss and gradients are from those of the whole batch; a missing one counts as zero."""
    assert run.gradients is not None
    assert whole.gradients is not None
    return _difference(run, whole, gradient_errors(filled(run.gradients, whole.gradients), whole.gradients))


def _difference(run: Fp64Run, whole: Fp64Run, errors: Mapping[str, float]) -> Difference:
    worst = max(errors, key=lambda name: nan_last(errors[name]))
    loss = relative_error(run.outputs["loss"].cpu(), whole.outputs["loss"].cpu())
    return Difference(loss=loss, gradient=errors[worst], parameter=worst)


def in_parts(context: CellContext, rows: int) -> Caller:
    """Calls the model on micro-batches and sums their losses, each weighted by its number of counted labels."""
    task = context.subject.task

    def call(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        total, losses = labels_in_mean(tensors["labels"], task), []
        # Unequal on purpose: one row, and the rest before it, so that dropout that is left on draws otherwise than for the
        # whole batch. The mean over no label is NaN by definition, and weighs nothing.
        for start, stop in ((1, rows), (0, 1)):
            part = {name: value[start:stop] for name, value in tensors.items()}
            if share := labels_in_mean(part["labels"], task) / total:
                losses.append(share * scalar_loss(call_model(model, part)))
        return {"loss": torch.stack(losses).sum()}

    return call


def in_training_mode(call: Callable[[nn.Module, Mapping[str, Any]], Any] = call_model, *, checkpointed: bool) -> Caller:
    """Makes a call in training mode, where checkpointing is on, with every dropout off.

    Args:
        call: what is called.
        checkpointed: with activation checkpointing, which a true fp64 run switches off again at its end.
    """

    def trained(model: nn.Module, tensors: Mapping[str, Any]) -> Any:
        if checkpointed:
            # The recomputation runs within the backward pass, beyond the call that turns dropout off.
            options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), WithoutDropout())}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
        model.train()
        with WithoutDropout():
            return call(model, tensors)

    return trained
