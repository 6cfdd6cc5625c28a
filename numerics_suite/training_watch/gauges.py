"""The figures of a training step, taken where the tensors are; none of them waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.devices.arithmetic import autocast_dtypes
from numerics_suite.engine.outputs import floating_outputs, main_output
from numerics_suite.training_watch.norms import floating, largest, local, samples, total_norm, update_ratio

Figures = list[tuple[str, Tensor]]


class Gauges:
    """Takes figures and keeps, within a step, what one hook leaves for another."""

    def __init__(self, model: nn.Module) -> None:
        """Read where the model is and in which dtype."""
        parameters = [p for p in model.parameters() if p.is_floating_point()]
        self.device = parameters[0].device if parameters else torch.device("cpu")
        self.limit = min((torch.finfo(p.dtype).max for p in parameters[-1:]), default=float("inf"))
        self._norm: Tensor | None = None
        self._clipped: frozenset[int] = frozenset()
        self._loss_seen = False
        self._before: dict[int, list[Tensor]] = {}

    def new_step(self) -> None:
        """Forget the last step."""
        self._norm, self._clipped, self._loss_seen = None, frozenset(), False
        self._before.clear()

    def of_output(self, output: Any, *, scaled: bool) -> tuple[Figures, float]:
        """Largest logit and the loss, and the largest number of the narrowest dtype that the logits went through.

        Args:
            output: of the model.
            scaled: a GradScaler is at work, so float16 is, even if accelerate gives back float32.
        """
        found = floating_outputs(output)
        figures: Figures = []
        limit = self.limit
        try:
            name, logits = main_output(found)
        except NotApplicableError:
            return [], limit
        if name != "loss" and logits.is_floating_point() and local(logits).numel():
            figures.append(("logits", largest(logits)))
            section = autocast_dtypes(logits.device).get(logits.device.type, logits.dtype)
            dtypes = [logits.dtype, section, *([torch.float16] if scaled else [])]
            limit = min(limit, *(torch.finfo(dtype).max for dtype in dtypes))
        loss = found.get("loss")
        if loss is not None and loss.numel():
            self._loss_seen = True
            figures.append(("loss", _scalar(loss)))
        return figures, limit

    def of_root(self, roots: Any, scaler: Any) -> Figures:
        """The loss that `backward` is called on, where the model gave none; divided by the loss scale."""
        root = roots if isinstance(roots, Tensor) else next(iter(roots), None)
        if self._loss_seen or not isinstance(root, Tensor) or root.numel() != 1 or not root.is_floating_point():
            return []
        scale = getattr(scaler, "_scale", None)
        loss = _scalar(root)
        return [("loss", loss / scale if isinstance(scale, Tensor) else loss)]

    def take_norm(self, gradients: Sequence[Tensor], order: float, norm: Tensor) -> None:
        """Keep the norm that clipping computed; the first of a step, which no clipping has changed yet."""
        if order == 2.0 and self._norm is None:
            self._norm, self._clipped = local(norm.detach()), frozenset(map(id, gradients))

    def of_gradients(self, optimizer: torch.optim.Optimizer) -> Figures:
        """The norm of the gradients that the optimizer is about to use."""
        gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        if not gradients:
            return []
        if self._norm is not None and all(id(gradient) in self._clipped for gradient in gradients):
            norm: Tensor | None = self._norm
        else:
            norm = total_norm(gradients)
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer divides by it within its kernel
        if norm is not None and isinstance(scale, Tensor):
            norm = norm / scale
        return [] if norm is None else [("gradient norm", norm)]

    def before_update(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep a sample of the weights."""
        self._before[id(optimizer)] = samples(parameters_of(optimizer))

    def of_update(self, optimizer: torch.optim.Optimizer) -> Figures:
        """The norm of the parameters that were updated, and how far the sample moved."""
        parameters = parameters_of(optimizer)
        norm, before = total_norm(parameters), self._before.pop(id(optimizer), [])
        figures: Figures = [] if norm is None else [("parameter norm", norm)]
        ratio = update_ratio(before, samples(parameters))
        return figures if ratio is None else [*figures, ("update ratio", ratio)]


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that the optimizer may change."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _scalar(value: Tensor) -> Tensor:
    part = floating([value])
    return part[0].float().mean() if part else torch.zeros(())
