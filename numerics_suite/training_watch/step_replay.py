"""The kept steps of a loop, taken again on one copy of its model: a training run whose batches, rates and optimizers are the loop's."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import median_low
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from numerics_suite.devices.condition import dtype_of
from numerics_suite.devices.kinds import kind_of
from numerics_suite.diagnosis.remedies import InputChange
from numerics_suite.engine.calls import call_with, input_device
from numerics_suite.engine.outputs import floating_outputs
from numerics_suite.engine.training_loop import BadTensor, HaltedError, Trainer, TrainingPlan, Trajectory
from numerics_suite.training_watch.inputs import named_inputs
from numerics_suite.training_watch.norms import total_norm
from numerics_suite.training_watch.ring import ForwardCall, as_called

if TYPE_CHECKING:
    from numerics_suite.training_watch.caught_step import CaughtStep


class StepReplay(Trainer):
    """Steps of a loop on one copy of its model."""

    def __init__(self, caught: CaughtStep, plan: TrainingPlan) -> None:
        """Rebuild the optimizers, if there is a loop to step."""
        model, self.start, self.share = caught.copy_model(), caught.start, caught.factor
        calls: dict[int, list[ForwardCall]] = {}
        for call in caught.start.calls:
            calls.setdefault(call.step, []).append(_changed(model, call, caught))
        self.calls = calls
        loop = caught.start.loop
        more = caught.unheld if plan.rebuilt else ()
        states = () if loop is None else loop.optimizers
        optimizers = [each.rebuilt(model, () if place else more) for place, each in enumerate(states)]
        self.unheld = () if plan.rebuilt else caught.unheld
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            if plan.eps is not None and "eps" in group:
                group["eps"] = plan.eps

        def forwards(step: int) -> list[Any]:
            # Of the model alone: through `self` the copy would wait for the collector to let its memory go.
            return [functools.partial(_outputs, model, call) for call in calls[step]]

        super().__init__(model, caught.condition, plan, forwards, optimizers)
        if loop is None:
            self.share *= self.start.scale if caught.as_caught else 1.0
        elif self.scaler.is_enabled():
            self.scaler.set_growth_interval(loop.growth_interval)
            self.scaler.set_backoff_factor(loop.backoff)

    def numbers(self) -> Sequence[int]:
        """The kept steps, over and over."""
        steps = list(self.calls)
        return [steps[index % len(steps)] for index in range(self.plan.steps)]

    def loss_of(self, outputs: Mapping[str, Tensor]) -> Tensor | None:
        """The model's own loss; a loop that computes it elsewhere leaves the forward pass."""
        loss = outputs.get("loss")
        return loss if loss is not None and loss.requires_grad and self.start.backward else None

    def share_of(self, step: int) -> float:
        """A mean over the step's losses, but for the factor that was read off."""
        return self.share / len(self.calls[step])

    def require_finite(self, step: int, kind: str, tensors: Mapping[str, Tensor]) -> None:
        """As the watch sees it, a norm is infinite where its squares are, though every element is finite."""
        super().require_finite(step, kind, tensors)
        norm = total_norm(tensors.values()) if kind in {"gradient", "parameter"} else None
        if norm is not None and not bool(torch.isfinite(norm)):
            bad = BadTensor(step=step, kind=kind, name="norm", others=0, gradient_norm=float(norm), loss=self.loss)
            raise HaltedError(bad)

    def update(self, step: int) -> None:
        """The optimizers' part of a step, at the rates that it had."""
        loop = self.start.loop
        if loop is None:
            return
        rates, slower = loop.rates.get(step, ()), self.plan.lr / loop.lr if loop.lr else 1.0
        for index, optimizer in enumerate(self.optimizers):
            for place, group in enumerate(optimizer.param_groups):
                now = dict(rates[index][place]) if index < len(rates) else {}
                group.update(now)
                if "lr" in group:
                    group["lr"] = now.get("lr", loop.optimizers[index].groups[place]["lr"]) * slower
        super().update(step)

    def run(self) -> Trajectory:
        """The steps; over all batches, the loss with the parameters of the start and with the last ones."""
        count = len(self.calls)
        again = self.plan.steps > count and bool(self.optimizers)
        before = list(self._losses_at_start()) if again else []
        run = super().run()
        if run.bad is not None or not again or not run.losses or not before:
            return run
        assert self.start.loop is not None
        last, began = run.losses[-count:], self.start.loop.began
        first = math.fsum(before) / len(before)
        # What had ruined the model before the start is not cured by a fall from there.
        first = min(first, began) if median_low(last) > began else first
        return replace(run, losses=(first, math.fsum(last) / len(last)))

    @torch.no_grad()
    def _losses_at_start(self) -> Iterator[float]:
        for calls in self.calls.values():
            losses = [float(each["loss"]) for each in (_outputs(self.model, call) for call in calls) if "loss" in each]
            if losses:
                yield math.fsum(losses) / len(losses)

    def finish(self) -> None:
        """The last pass over the batches says what the loss became."""


def _outputs(model: nn.Module, call: ForwardCall) -> Mapping[str, Tensor]:
    with as_called(call, input_device(model)):
        return floating_outputs(call_with(model, call.args, call.kwargs))


def _changed(model: nn.Module, call: ForwardCall, caught: CaughtStep) -> ForwardCall:
    """The call under the conditions of the copy."""
    tensors = named_inputs(model, call)
    for change in (change for change in caught.changes if isinstance(change, InputChange)):
        tensors = change.of(tensors)
    count, kind, lower = len(call.args), kind_of(caught.cell.device), caught.recipe.autocast
    values = list(tensors.values())
    autocast = call.autocast if caught.as_caught else {} if lower is None else {kind: dtype_of(lower)}
    kwargs = dict(zip(list(tensors)[count:], values[count:], strict=True))
    return replace(call, args=tuple(values[:count]), kwargs=kwargs, autocast=autocast)
