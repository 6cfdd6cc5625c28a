"""N optimizer steps on a fixed batch, watched: every loss, logit, gradient, parameter and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.devices.arithmetic import grad_scaler
from numerics_suite.devices.condition import Condition
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.outputs import floating_outputs, loss_in
from numerics_suite.engine.runner import backward_pass, forward_pass
from numerics_suite.observing.finiteness import nonfinite_count
from numerics_suite.observing.roundoff import wide

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a cell is trained.

    Attributes:
        steps: optimizer steps.
        optimizer: `adamw`, `adam` or `sgd`, each with torch's defaults.
        lr: learning rate.
        max_grad_norm: clip the total gradient norm to it, None for no clipping.
        scope: `full`, `head`, `last:K` or `lora`: what is trained.
        eps: of an Adam, None for torch's default.
        init_scale: what the GradScaler begins with, None for torch's default.
    """

    steps: int = 5
    optimizer: str = "adamw"
    lr: float = 1e-4
    max_grad_norm: float | None = None
    scope: str = "full"
    eps: float | None = None
    init_scale: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BadTensor:
    """The first non-finite tensor of a training run.

    Attributes:
        step: from 1.
        kind: `logits`, `loss`, `gradient`, `parameter` or `optimizer state`.
        name: of the output, parameter or state.
        others: how many more tensors of that kind were non-finite at that moment.
        gradient_norm: total norm of the gradients at that step, as far as it was reached.
        loss: that step's.
    """

    step: int
    kind: str
    name: str
    others: int
    gradient_norm: float
    loss: float = float("nan")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """What N steps did.

    Attributes:
        losses: the loss before each step, and once more after the last, as Python floats.
        gradient_norms: total norm before clipping, unscaled, for each step.
        clipped_norms: total norm after clipping, empty without clipping.
        clipped_at: the steps of these: one whose gradients overflowed is skipped, not clipped.
        scales: the loss scale after each step, empty without a scaler.
        skipped: steps that the scaler skipped.
        dead: trainable parameters whose gradient was absent (None) or exactly zero at the first step.
        absent: those of `dead` without any gradient at all.
        gradient_dtypes: parameter name to gradient dtype where it is not the parameter's own.
        parameter_drift: parameters whose dtype changed during training.
        bad: the first non-finite tensor, None in a clean run.
        predicted_decrease: what first-order theory says the first step takes off the loss, NaN where unknown.
        trained: names of the trained parameters.
    """

    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    clipped_norms: tuple[float, ...] = ()
    clipped_at: tuple[int, ...] = ()
    scales: tuple[float, ...] = ()
    skipped: int = 0
    dead: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    gradient_dtypes: Mapping[str, str] = field(default_factory=dict)
    parameter_drift: tuple[str, ...] = ()
    bad: BadTensor | None = None
    predicted_decrease: float = float("nan")
    trained: tuple[str, ...] = ()


class HaltedError(Exception):
    """Training met its first non-finite tensor."""

    def __init__(self, bad: BadTensor) -> None:
        """Keep the tensor that was met."""
        super().__init__(bad.name)
        self.bad = bad


def make_optimizer(plan: Plan, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The plan's optimizer, with torch's defaults but for what the plan says.

    Args:
        plan: optimizer, learning rate and eps.
        parameters: to be trained, at least one.
    """
    options: dict[str, Any] = {} if plan.eps is None else {"eps": plan.eps}
    optimizer: torch.optim.Optimizer = OPTIMIZERS[plan.optimizer](list(parameters), lr=plan.lr, **options)
    return optimizer


class Trainer:
    """The state of one watched training run."""

    def __init__(self, model: nn.Module, condition: Condition, plan: Plan) -> None:
        """Set the optimizer and, for loss-scaled recipes, a GradScaler with torch's defaults."""
        self.model, self.condition, self.plan = model, condition, plan
        self.recipe = condition.precision
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(plan, self.parameters.values())
        self.scaler = grad_scaler(condition.device, enabled=self.recipe.loss_scaling, init_scale=plan.init_scale)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.clipped: dict[int, float] = {}
        self.loss = float("nan")
        self.scales: list[float] = []
        self.skipped = 0
        self.dead: tuple[str, ...] = ()
        self.absent: tuple[str, ...] = ()
        self.gradient_dtypes: dict[str, str] = {}
        self.predicted = float("nan")

    def forward(self, tensors: Mapping[str, Any], step: int) -> Tensor:
        """The loss, once it and the logits are known to be finite."""
        with forward_pass(self.condition):
            output = floating_outputs(call_model(self.model, tensors))
        loss = loss_in(output)
        self.loss = float(loss.detach())
        self._require_finite(step, "logits", {k: v for k, v in output.items() if k != "loss"})
        self._require_finite(step, "loss", {"loss": loss})
        self.losses.append(self.loss)
        return loss

    def _require_finite(self, step: int, kind: str, tensors: Mapping[str, Tensor]) -> None:
        bad = [name for name, value in tensors.items() if nonfinite_count(value.detach())]
        if bad:
            norm = self.norms[-1] if self.norms else float("nan")
            others = len(bad) - 1
            raise HaltedError(
                BadTensor(step=step, kind=kind, name=bad[0], others=others, gradient_norm=norm, loss=self.loss)
            )

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.parameters.items() if p.grad is not None}

    def _note_first_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        self.absent = tuple(name for name in self.parameters if name not in gradients)
        zero = {name for name, g in gradients.items() if not bool(g.any())}
        self.dead = tuple(name for name in self.parameters if name in zero or name in self.absent)
        self.gradient_dtypes = {
            name: str(g.dtype).removeprefix("torch.")
            for name, g in gradients.items()
            if g.dtype != self.parameters[name].dtype
        }
        total = sum(float(wide(g).abs().sum()) for g in gradients.values())
        # Adam's first step is lr in the direction of each gradient's sign; SGD's is lr times the gradient.
        squares = sum(float(wide(g).square().sum()) for g in gradients.values())
        self.predicted = self.plan.lr * (squares if self.plan.optimizer == "sgd" else total)

    def step(self, tensors: Mapping[str, Any], step: int) -> None:
        """One optimizer step, checked after each of its parts."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward(tensors, step)
        with backward_pass(self.condition):
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        self.scaler.unscale_(self.optimizer)
        gradients = self._gradients()
        self.norms.append(float(torch.nn.utils.get_total_norm(list(gradients.values())))) if gradients else None
        overflowed = any(nonfinite_count(g) for g in gradients.values())
        if not overflowed and not self.dead and step == 1 + self.skipped:
            self._note_first_gradients(gradients)
        if self.recipe.loss_scaling and overflowed:
            self.skipped += 1  # the scaler's business: it skips this step and halves the scale
        else:
            self._require_finite(step, "gradient", gradients)
        if self.plan.max_grad_norm is not None and not overflowed:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.plan.max_grad_norm)
            self.clipped[step] = float(torch.nn.utils.get_total_norm(list(gradients.values())))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.recipe.loss_scaling:
            self.scales.append(float(self.scaler.get_scale()))
        self._require_finite(step, "parameter", self.parameters)
        self._require_finite(step, "optimizer state", self._optimizer_state())

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, p in self.parameters.items()
            for key, value in self.optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }


def train(model: nn.Module, tensors: Mapping[str, Any], *, condition: Condition, plan: Plan) -> Trajectory:
    """Train the model in place for `plan.steps` steps on one batch and say what happened.

    The model is left as the last step left it; hand in a copy. Dropout is on only where the model was in training
    mode, so a caller who wants a reproducible curve hands it in eval mode.

    Args:
        model: with `requires_grad` set on what is trained.
        tensors: the batch with its labels.
        condition: precision and device.
        plan: steps, optimizer, learning rate, clipping.
    """
    trainer = Trainer(model, condition, plan)
    before = {name: p.dtype for name, p in trainer.parameters.items()}
    bad: BadTensor | None = None
    try:
        for step in range(1, plan.steps + 1):
            trainer.step(tensors, step)
        with torch.no_grad():
            trainer.forward(tensors, plan.steps + 1)
    except HaltedError as halted:
        bad = halted.bad
    trainer.optimizer.zero_grad(set_to_none=True)
    return Trajectory(
        losses=tuple(trainer.losses),
        gradient_norms=tuple(trainer.norms),
        clipped_norms=tuple(trainer.clipped.values()),
        clipped_at=tuple(trainer.clipped),
        scales=tuple(trainer.scales),
        skipped=trainer.skipped,
        dead=trainer.dead,
        absent=trainer.absent,
        gradient_dtypes=trainer.gradient_dtypes,
        parameter_drift=tuple(name for name, p in trainer.parameters.items() if p.dtype != before[name]),
        bad=bad,
        predicted_decrease=trainer.predicted,
        trained=tuple(trainer.parameters),
    )
