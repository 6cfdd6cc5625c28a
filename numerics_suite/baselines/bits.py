"""SHA-256 over the raw bytes that the cell computes, at real tokens: in its own precision, and in true fp64.

Where an order of sums changes, 8 bits of bfloat16 hide it nearly always, and the last bits of float64 show it. (Releases from 4.46.3
to 5.24.0 agree to the bit in float64 but for two places; in bfloat16 one of these shows in one run of twenty.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from numerics_suite.baselines.batches import real_tokens
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.outputs import floating_outputs, loss_in
from numerics_suite.engine.runner import backward_pass, forward_pass
from numerics_suite.observations.roundoff import wide

SCALE: Final = 65536.0
"""Torch's first loss scale, a power of two: it moves no bit of a gradient that does not overflow or underflow."""


def digest_of_digests(bits: Mapping[str, str]) -> str:
    """One for all parts."""
    return hashlib.sha256(repr(sorted(bits.items())).encode()).hexdigest()


def loss_and_gradients(
    context: CellContext,
    model: nn.Module,
    tensors: Mapping[str, Any],
    *,
    gradients: bool,
    on_gradient: Callable[[str, Tensor], None],
) -> dict[str, list[Tensor]]:
    """What `loss` and `gradients` of the training batch are under the cell's recipe, to be digested.

    The loss is that of the batch with its rows in every rotation: a mean has one last bit only, which one order may keep by luck.

    Args:
        context: of the cell.
        model: whose parameters get gradients; they are taken away again.
        tensors: the batch with its labels.
        gradients: False where the precision is not for training.
        on_gradient: gets each parameter's gradient in float64, without the loss scale.
    """
    scale = SCALE if context.recipe.loss_scaling else 1.0
    with torch.set_grad_enabled(gradients):
        loss = _loss(context, model, tensors)
    found = {"loss": [loss, *_rotated_losses(context, model, tensors)]}
    if gradients:
        with backward_pass(context.condition):
            (loss * scale).backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                on_gradient(name, wide(parameter.grad) / scale)
        found["gradients"] = [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]
        model.zero_grad(set_to_none=True)
    return found


def _loss(context: CellContext, model: nn.Module, tensors: Mapping[str, Any]) -> Tensor:
    with forward_pass(context.condition):
        return loss_in(floating_outputs(call_model(model, tensors)))


def _rotated_losses(context: CellContext, model: nn.Module, tensors: Mapping[str, Any]) -> list[Tensor]:
    """The loss with the rows in other orders, where rows are known."""
    real = real_tokens(tensors) if context.takes_ids else None
    held = [value for value in tensors.values() if isinstance(value, Tensor)]
    if real is None or any(value.shape[:1] != real.shape[:1] for value in held):
        return []
    with torch.no_grad():
        return [
            _loss(context, model, {n: v.roll(step, 0) if isinstance(v, Tensor) else v for n, v in tensors.items()})
            for step in range(1, real.shape[0])
        ]
