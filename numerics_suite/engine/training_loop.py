"""The one training loop, which checks every loss, logit, gradient, parameter and optimizer state.

The suite, the rehearsal and the remedies step on one fixed batch; a step that the watch caught is taken again with the loop's own
batches and optimizers. Both are a :class:`Trainer`, which takes its forward passes and its optimizers as arguments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.devices.arithmetic import grad_scaler
from numerics_suite.devices.condition import Condition
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.outputs import floating_outputs, loss_in
from numerics_suite.engine.runner import backward_pass, forward_pass
from numerics_suite.engine.updates import HeldShare, UpdateMeter, metered
from numerics_suite.observations.finiteness import nonfinite_count
from numerics_suite.observations.roundoff import power_sum

Forward = Callable[[], Mapping[str, Tensor]]
"""One forward pass of a step, with gradients: its floating outputs by name."""

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """How a cell is trained.

    Attributes:
        steps: optimizer steps.
        optimizer: `adamw`, `adam` or `sgd`, each with torch's defaults.
        lr: learning rate.
        max_grad_norm: clip the total gradient norm to it, None for no clipping.
        scope: `full`, `head`, `last:K` or `lora`: what is trained.
        eps: of an Adam, None for torch's default.
        init_scale: initial scale of the GradScaler, None for torch's default.
        rounding: how parameters of a narrow dtype take a step, `nearest`, `master` or `stochastic`: see
            :func:`~numerics_suite.engine.updates.metered`.
        rebuilt: optimizers are made anew over every parameter that is meant to train.
    """

    steps: int = 5
    optimizer: str = "adamw"
    lr: float = 1e-4
    max_grad_norm: float | None = None
    scope: str = "full"
    eps: float | None = None
    init_scale: float | None = None
    rounding: str = "nearest"
    rebuilt: bool = False


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
    """The record of a training run.

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
        predicted_decrease: decrease of the loss in the first step by first-order theory, NaN where unknown.
        trained: names of the trained parameters.
        unmoved: parameters that should have moved and still have their first values, including those in no optimizer.
        held: share of the steps that parameters narrower than float32 keep, by dtype.
        clipped_copy: the gradients as clipping would leave them; None if the run clips, or no step exceeds the norm.
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
    unmoved: tuple[str, ...] = ()
    held: tuple[HeldShare, ...] = ()
    clipped_copy: ClippedCopy | None = None


TRAJECTORY = "training run"
"""Name under which checks declare that they read the cell's training run."""

RECIPE_NORM = 1.0
"""The norm that GLM-4's fine-tuning recipes clip to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedCopy:
    """The gradients of an unclipped run as clipping to :data:`RECIPE_NORM` would leave them.

    Attributes:
        step: the first whose gradients are above that norm.
        before: their total norm.
        after: that of a copy of them that was clipped.
    """

    step: int
    before: float
    after: float


class HaltedError(Exception):
    """Training met its first non-finite tensor."""

    def __init__(self, bad: BadTensor) -> None:
        """Keep the tensor that was met."""
        super().__init__(bad.name)
        self.bad = bad


def make_optimizer(plan: TrainingPlan, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """The plan's optimizer, with torch's defaults but for what the plan says."""
    options: dict[str, Any] = {} if plan.eps is None else {"eps": plan.eps}
    optimizer: torch.optim.Optimizer = OPTIMIZERS[plan.optimizer](list(parameters), lr=plan.lr, **options)
    return optimizer


class Trainer:
    """The state of one watched training run.

    Attributes:
        model: trained in place.
        condition: its loss scaling and backward arithmetic.
        plan: clipping, and how many steps.
        parameters: those that are trained, by name.
        optimizers: all step in each step.
        scaler: disabled where the recipe has no loss scaling.
        forwards: the forward passes of a step, by its number.
        unheld: parameters that are meant to train and that no optimizer holds.
    """

    unheld: tuple[str, ...] = ()

    def __init__(
        self,
        model: nn.Module,
        condition: Condition,
        plan: TrainingPlan,
        forwards: Callable[[int], Sequence[Forward]],
        optimizers: Sequence[torch.optim.Optimizer] | None = None,
    ) -> None:
        """Set the plan's optimizer unless others are given and, for loss-scaled recipes, a GradScaler with torch's defaults."""
        self.model, self.condition, self.plan, self.forwards = model, condition, plan, forwards
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizers = [make_optimizer(plan, self.parameters.values())] if optimizers is None else optimizers
        scaled = condition.precision.loss_scaling
        self.scaler = grad_scaler(condition.device, enabled=scaled, init_scale=plan.init_scale)
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.clipped: dict[int, float] = {}
        self.clipped_copy: ClippedCopy | None = None
        self.loss, self.taken = float("nan"), 0
        self.scales: list[float] = []
        self.skipped = 0
        self.dead: tuple[str, ...] = ()
        self.absent: tuple[str, ...] = ()
        self.gradient_dtypes: dict[str, str] = {}
        self.predicted = float("nan")

    def numbers(self) -> Sequence[int]:
        """The steps that are taken, in order."""
        return range(1, self.plan.steps + 1)

    def loss_of(self, outputs: Mapping[str, Tensor]) -> Tensor | None:
        """The scalar of a forward pass to differentiate, None for nothing."""
        return loss_in(outputs)

    def forward(self, run: Forward, step: int) -> Tensor | None:
        """The loss of one forward pass, once it and the logits are known to be finite."""
        output = run()
        loss = self.loss_of(output)
        self.loss = float("nan") if loss is None else float(loss.detach())
        self.require_finite(step, "logits", {k: v for k, v in output.items() if k != "loss"})
        self.require_finite(step, "loss", {} if loss is None else {"loss": loss})
        return loss

    def require_finite(self, step: int, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """End the run at a tensor that is not finite.

        Raises:
            HaltedError: one is not.
        """
        bad = [name for name, value in tensors.items() if nonfinite_count(value.detach())]
        if bad:
            norm = self.norms[-1] if self.norms else float("nan")
            others = len(bad) - 1
            raise HaltedError(
                BadTensor(step=step, kind=kind, name=bad[0], others=others, gradient_norm=norm, loss=self.loss)
            )

    def gradients(self) -> dict[str, Tensor]:
        """The existing gradients, by parameter."""
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
        # Adam's first step is lr in the direction of each gradient's sign; SGD's is lr times the gradient.
        descends = self.plan.optimizer == "sgd"
        self.predicted = self.plan.lr * sum(power_sum(g, 2 if descends else 1) for g in gradients.values())

    def step(self, step: int) -> None:
        """One optimizer step, checked after each of its parts.

        Raises:
            HaltedError: a tensor is not finite.
        """
        self.model.zero_grad(set_to_none=True)
        self.taken += 1
        losses = [loss for run in self.forwards(step) if (loss := self._differentiated(run, step)) is not None]
        if not losses:
            return
        self.losses.append(math.fsum(losses) / len(losses))
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        gradients = self.gradients()
        self.norms.append(float(torch.nn.utils.get_total_norm(list(gradients.values())))) if gradients else None
        overflowed = any(nonfinite_count(g) for g in gradients.values())
        if not overflowed and not self.dead and self.taken == 1 + self.skipped:
            self._note_first_gradients(gradients)
        if self.scaler.is_enabled() and overflowed:
            self.skipped += 1  # the scaler's business: it skips this step and halves the scale
        else:
            self.require_finite(step, "gradient", gradients)
        if self.plan.max_grad_norm is not None and not overflowed and self.optimizers:
            torch.nn.utils.clip_grad_norm_(list(self.parameters.values()), self.plan.max_grad_norm)
            self.clipped[step] = float(torch.nn.utils.get_total_norm(list(gradients.values())))
        elif self.clipped_copy is None and not overflowed and self.norms and self.norms[-1] > RECIPE_NORM:
            self.clipped_copy = _clipped_copy(step, self.norms[-1], gradients)
        self.update(step)
        if self.scaler.is_enabled():
            self.scales.append(float(self.scaler.get_scale()))
        self.require_finite(step, "parameter", self.parameters)
        self.require_finite(step, "optimizer state", self._optimizer_state())

    def _differentiated(self, run: Forward, step: int) -> float | None:
        loss = self.forward(run, step)
        if loss is None:
            return None
        share = self.share_of(step)
        with backward_pass(self.condition):
            self.scaler.scale(loss if share == 1 else loss * share).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def share_of(self, step: int) -> float:  # noqa: ARG002 - for loops that accumulate
        """Factor of each loss of the step before its backward pass."""
        return 1.0

    def update(self, step: int) -> None:  # noqa: ARG002 - for loops whose rates change from step to step
        """The optimizers' part of a step."""
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()

    def _optimizer_state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, p in self.parameters.items()
            for optimizer in self.optimizers
            for key, value in optimizer.state.get(p, {}).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }

    def finish(self) -> None:
        """Note the loss after the last step."""
        step = self.plan.steps + 1
        losses = [loss for run in self.forwards(step) if (loss := self.forward(run, step)) is not None]
        self.losses += [float(loss) for loss in losses]

    def run(self) -> Trajectory:
        """Run every step, up to the first tensor that is not finite, and return the record."""
        before = {name: p.dtype for name, p in self.parameters.items()}
        bad: BadTensor | None = None
        meter = UpdateMeter.of(len(self.parameters))
        try:
            with metered(self.optimizers, meter, self.plan.rounding):
                for step in self.numbers():
                    self.step(step)
            with torch.no_grad():
                self.finish()
        except HaltedError as halted:
            bad = halted.bad
        self.model.zero_grad(set_to_none=True)
        return Trajectory(
            losses=tuple(self.losses),
            gradient_norms=tuple(self.norms),
            clipped_norms=tuple(self.clipped.values()),
            clipped_at=tuple(self.clipped),
            scales=tuple(self.scales),
            skipped=self.skipped,
            dead=self.dead,
            absent=self.absent,
            gradient_dtypes=self.gradient_dtypes,
            parameter_drift=tuple(name for name, p in self.parameters.items() if p.dtype != before[name]),
            bad=bad,
            predicted_decrease=self.predicted,
            trained=tuple(self.parameters),
            unmoved=(*self.unheld, *meter.unmoved(self.parameters)),
            held=meter.shares(),
            clipped_copy=self.clipped_copy,
        )


def _clipped_copy(step: int, norm: float, gradients: Mapping[str, Tensor]) -> ClippedCopy:
    """A copy of these gradients, clipped by torch."""
    holders = [gradient.detach() for gradient in gradients.values()]
    copies = [holder.clone() for holder in holders]
    for holder, own in zip(holders, copies, strict=True):
        holder.grad = own
    torch.nn.utils.clip_grad_norm_(holders, RECIPE_NORM)
    after = torch.nn.utils.get_total_norm(copies)
    return ClippedCopy(step=step, before=norm, after=float(after))


def trainer_of(model: nn.Module, tensors: Mapping[str, Any], *, condition: Condition, plan: TrainingPlan) -> Trainer:
    """A run over one fixed batch.

    The model is left as the last step left it; hand in a copy. Dropout is on only if the model was in training mode;
    for a reproducible curve, pass it in eval mode.
    """

    def forward() -> Mapping[str, Tensor]:
        with forward_pass(condition):
            return floating_outputs(call_model(model, tensors))

    return Trainer(model, condition, plan, lambda _step: (forward,))


def train(model: nn.Module, tensors: Mapping[str, Any], *, condition: Condition, plan: TrainingPlan) -> Trajectory:
    """Train the model in place for `plan.steps` steps on one batch and return the record; see :func:`trainer_of`."""
    return trainer_of(model, tensors, condition=condition, plan=plan).run()
