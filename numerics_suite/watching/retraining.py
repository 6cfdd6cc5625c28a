"""The kept steps of a loop taken again on a copy of its model, as they were or under another condition."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.engine.outputs import floating_outputs
from numerics_suite.observing.finiteness import nonfinite_count
from numerics_suite.watching.judge import LOST_SCALE
from numerics_suite.watching.norms import total_norm
from numerics_suite.watching.patches import unheard
from numerics_suite.watching.ring import Call, as_called
from numerics_suite.watching.stepping import Loop


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """What is otherwise; as it was where nothing is given.

    Attributes:
        change: made to the copy before anything runs.
        inputs: makes of each call another.
        max_norm: the total gradient norm is clipped to it.
        lr_factor: multiplies every learning rate.
        eps: of every optimizer that has one.
        autocast: in place of the sections around the calls, by kind of device; empty for none.
        scale: what a GradScaler begins with; 0 for no GradScaler.
    """

    change: Callable[[nn.Module], None] = lambda _model: None
    inputs: Callable[[Call], Call] = lambda call: call
    max_norm: float | None = None
    lr_factor: float = 1.0
    eps: float | None = None
    autocast: Mapping[str, torch.dtype] | None = None
    scale: float | None = None


AS_IT_WAS = Condition()


@dataclass(slots=True, kw_only=True)
class Run:
    """What a replay saw.

    Attributes:
        bad_step: the step at which a value was not finite, None where all were.
        bad: what it was, such as `the logits`.
        after_update: it was seen only once an optimizer had stepped.
        before: mean loss of each step's batches with the parameters as they were at the start; empty unless asked for.
        losses: mean loss of each step, in order; empty where the model computes none.
        norm: total gradient norm of the first step, before clipping; NaN until there is one.
        steps: that were taken or skipped.
        skipped: those that the GradScaler skipped.
    """

    bad_step: int | None = None
    bad: str = ""
    after_update: bool = False
    before: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norm: float = math.nan
    steps: int = 0
    skipped: int = 0


class BadValueError(Exception):
    """A value is not finite; ends a replay."""

    def __init__(self, what: str, *, after_update: bool = False) -> None:
        """Say which value.

        Args:
            what: such as `the logits are not finite`.
            after_update: an optimizer had stepped before.
        """
        super().__init__(what)
        self.what, self.after_update = what, after_update


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What was kept of a loop.

    Attributes:
        calls: forward passes, oldest first.
        loop: how it stepped, None where only forward and backward passes can be run again.
        scale: of the loss, where there is no loop that has its own.
        factor: what each loss counts beside its share of the step; see :func:`factor_of`.
        backward: False where the parameters are not those of the calls, so that only the forward pass goes wrong in the same place.
    """

    calls: Sequence[Call]
    loop: Loop | None = None
    scale: float = 1.0
    factor: float = 1.0
    backward: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a replay begins.

    Attributes:
        words: `the snapshot from before step 3`.
        kept: the calls from there on, and how the loop stepped.
        parameters: what the model held there; empty for what it holds now.
        whole: every step up to the bad one is among the calls.
    """

    words: str
    kept: Kept
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    whole: bool = True

    @property
    def first(self) -> int:
        """The first step of the replay, 0 of no calls."""
        return self.kept.calls[0].step if self.kept.calls else 0


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within it replays are as their calls were, wherever in a loop they run, and no watch takes them for training."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unheard())
        stack.enter_context(torch.enable_grad())
        kinds = {"cpu", *(["cuda"] if torch.cuda.is_available() else [])}
        for kind in sorted(kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def copied(model: nn.Module, start: Start, largest: float) -> nn.Module:
    """A copy of the model with the parameters of the start.

    Args:
        model: left as it is.
        start: where the replay begins.
        largest: bytes of parameters of which a copy is made.

    Raises:
        NotApplicableError: it is larger, or cannot be copied.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > largest:
        reason = (
            f"not tried in the loop itself: the parameters take {size >> 20} MiB; numerics-suite check --bundle does"
        )
        raise NotApplicableError(reason)
    try:
        copy = deepcopy(model)
    except Exception as error:
        reason = f"not tried: the model cannot be copied ({type(error).__name__})"
        raise NotApplicableError(reason) from error
    with torch.no_grad():
        for name, parameter in copy.named_parameters():
            parameter.grad = None
            if name in start.parameters:
                parameter.data = start.parameters[name].to(parameter.device, parameter.dtype, copy=True)
    return copy


class Replay:
    """Steps of a loop on one copy of its model.

    Attributes:
        model: the copy, which is changed.
        optimizers: over its parameters; none where nothing can be stepped.
    """

    def __init__(self, model: nn.Module, kept: Kept, condition: Condition = AS_IT_WAS) -> None:
        """Make the optimizers, if there is a loop to step.

        Args:
            model: a copy that is this replay's own.
            kept: of the loop.
            condition: what is otherwise.
        """
        condition.change(model)
        self.model, self.condition, self.loop, self.kept = model, condition, kept.loop, kept
        self.calls: dict[int, list[Call]] = {}
        for call in kept.calls:
            self.calls.setdefault(call.step, []).append(self._call(call))
        self.optimizers = [each.rebuilt(model) for each in kept.loop.optimizers] if kept.loop is not None else []
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            if condition.eps is not None and "eps" in group:
                group["eps"] = condition.eps
        self._scaler = self._made_scaler()

    def _call(self, call: Call) -> Call:
        call = self.condition.inputs(call)
        return call if self.condition.autocast is None else replace(call, autocast=self.condition.autocast)

    def _made_scaler(self) -> Any:
        loop, scale = self.loop, self.condition.scale
        kind = next((p.device.type for p in self.model.parameters()), "cpu")
        if loop is None or not loop.scaled or scale == 0:
            return torch.amp.GradScaler(kind, enabled=False)
        begins = loop.scale if scale is None else scale
        return torch.amp.GradScaler(kind, init_scale=begins, growth_interval=loop.growth_interval)

    def run(self, *, passes: int = 1, until: int | None = None, look_first: bool = False) -> Run:
        """Take the steps, up to the first value that is not finite.

        Args:
            passes: how many times over the same batches; a second time with the rates of the same steps.
            until: the step to end before, None for all.
            look_first: at the loss of every batch before the first step.
        """
        seen = Run(before=self._look() if look_first else [])
        step = 0
        try:
            for _ in range(passes):
                for step in self.calls:
                    if until is not None and step >= until:
                        return seen
                    self.step(step, seen)
        except BadValueError as bad:
            seen.bad_step, seen.bad, seen.after_update = step, bad.what, bad.after_update
        return seen

    def step(self, step: int, seen: Run) -> None:
        """One step: its forward passes, their backward passes, the optimizers.

        Args:
            step: one of the kept ones.
            seen: what is added to.

        Raises:
            BadValueError: a value is not finite, or a GradScaler has no scale left.
        """
        for parameter in self.model.parameters():
            parameter.grad = None
        weight = self.kept.factor / len(self.calls[step])
        losses = [loss for call in self.calls[step] if (loss := self._passes(call, weight)) is not None]
        if not losses:
            return
        seen.losses.append(sum(losses) / len(losses))
        if self.optimizers:
            self._update(step, seen)
        elif self.kept.backward:
            _require_finite_norm(self._gradients(), "gradient")
        seen.steps += 1

    @torch.no_grad()
    def _look(self) -> list[float]:
        found = [[float(self.forward(call).get("loss", math.nan)) for call in calls] for calls in self.calls.values()]
        return [sum(losses) / len(losses) for losses in found if not math.isnan(losses[0])]

    def forward(self, call: Call) -> dict[str, Tensor]:
        """The floating outputs of one call.

        Args:
            call: one of the kept ones.
        """
        with as_called(call):
            return floating_outputs(self.model(*call.args, **call.kwargs))

    def _passes(self, call: Call, weight: float) -> float | None:
        """Forward and backward; the loss, None where the model computes none."""
        found = self.forward(call)
        _require_finite(found, "the")
        loss = found.get("loss")
        if loss is None or not loss.requires_grad or not self.kept.backward:
            return None
        scale = 1.0 if self.loop is not None else self._scale_without_loop
        with torch.autocast(loss.device.type, enabled=False):
            self._scaler.scale(loss * (weight * scale)).backward()
        return float(loss.detach())

    @property
    def _scale_without_loop(self) -> float:
        asked = self.condition.scale
        return self.kept.scale if asked is None else asked or 1.0

    def _gradients(self) -> dict[str, Tensor]:
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}

    def _update(self, step: int, seen: Run) -> None:
        for optimizer in self.optimizers:
            self._scaler.unscale_(optimizer)
        gradients = self._gradients()
        overflowed = any(nonfinite_count(gradient) for gradient in gradients.values())
        if not overflowed or not self._scaler.is_enabled():
            norm = _require_finite_norm(gradients, "gradient")
            seen.norm = norm if math.isnan(seen.norm) else seen.norm
            self._clip()
        for index, optimizer in enumerate(self.optimizers):
            self._set_rates(step, index, optimizer)
            self._scaler.step(optimizer)
        self._scaler.update()
        seen.skipped += int(overflowed)
        if self._scaler.is_enabled() and self._scaler.get_scale() < LOST_SCALE:
            message = f"the loss scale is {self._scaler.get_scale():g}, below {LOST_SCALE:g}, and every step is skipped"
            raise BadValueError(message)
        _require_finite_norm(dict(self.model.named_parameters()), "parameter", after_update=True)

    def _clip(self) -> None:
        loops = None if self.loop is None else self.loop.max_norm
        asked = [norm for norm in (loops, self.condition.max_norm) if norm is not None]
        if asked:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), min(asked))

    def _set_rates(self, step: int, index: int, optimizer: torch.optim.Optimizer) -> None:
        assert self.loop is not None
        rates = self.loop.rates.get(step, ())
        for place, group in enumerate(optimizer.param_groups):
            began = self.loop.optimizers[index].groups[place]
            now = dict(rates[index][place]) if index < len(rates) else {}
            group.update(now)
            if "lr" in group:
                group["lr"] = now.get("lr", began["lr"]) * self.condition.lr_factor


def factor_of(model: nn.Module, kept: Kept) -> float:
    """What a loop multiplies its losses by before they go backward: read off the gradient norm of its first step.

    One that accumulates divides them by their number, or hands the number of tokens to the model, which then does. A mean over the
    step's losses is what is assumed; the norm that the watch read says how far off that is.

    Args:
        model: a copy that is this call's own.
        kept: of the loop.
    """
    if kept.loop is None or len(kept.loop.optimizers) != 1 or not kept.calls:
        return 1.0
    first = kept.calls[0].step
    read = kept.loop.norms.get(first, math.nan)
    replay = Replay(model, replace(kept, calls=[call for call in kept.calls if call.step == first]))
    norm = replay.run().norm
    sound = math.isfinite(read) and math.isfinite(norm) and read > 0 and norm > 0
    return read / norm if sound else 1.0


def _require_finite_norm(named: Mapping[str, Tensor], what: str, *, after_update: bool = False) -> float:
    """The norm of all of them; as the watch sees it, it is infinite where its squares are, though every element is finite.

    Raises:
        BadValueError: an element or the norm is not finite.
    """
    _require_finite(named, f"the {what} of" if what == "gradient" else f"the {what}", after_update=after_update)
    norm = total_norm(named.values())
    if norm is None or bool(torch.isfinite(norm)):
        return math.nan if norm is None else float(norm)
    message = f"the {what} norm is not finite"
    raise BadValueError(message, after_update=after_update)


def _require_finite(named: Mapping[str, Tensor], what: str, *, after_update: bool = False) -> None:
    for name, value in named.items():
        if nonfinite_count(value.detach()):
            message = f"{what} {name} {'are' if name == 'logits' else 'is'} not finite"
            raise BadValueError(message, after_update=after_update)
