"""`watch`: one training run seen through hooks, its figures read when they have arrived, and judged."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.records import Finding
from numerics_suite.training_watch import inputs
from numerics_suite.training_watch.alarms import Alarm, NumericsError, Reading
from numerics_suite.training_watch.async_metrics import Mailbox
from numerics_suite.training_watch.bundle import Caught
from numerics_suite.training_watch.caught_step import bad_parameters
from numerics_suite.training_watch.confirmation import ONGOING, confirmed, never_fits
from numerics_suite.training_watch.diagnosis import CaughtContext
from numerics_suite.training_watch.divergence import diverged
from numerics_suite.training_watch.gauges import Gauges, parameters_of
from numerics_suite.training_watch.hooks import around_forward, around_step, plain_model, plain_optimizer
from numerics_suite.training_watch.judge import HALVED, HALVINGS_AT_START, ROSE, Judge
from numerics_suite.training_watch.norms import is_shard
from numerics_suite.training_watch.optimizer_states import rates_of
from numerics_suite.training_watch.patches import listening
from numerics_suite.training_watch.response import (
    OnBad,
    Response,
    checked_policy,
    early,
    logged,
    send,
    several_processes,
)
from numerics_suite.training_watch.ring import Ring
from numerics_suite.training_watch.snapshots import CaughtValue, Snapshots
from numerics_suite.training_watch.updates import UNREACHED, ZERO, Updates
from numerics_suite.training_watch.watch_settings import WatchSettings


class Watch:
    """A watch, open between `with` and its end; made by :func:`watch`.

    Attributes:
        step: the optimizer step that runs or ran last, from 1; a step that a GradScaler skipped counts.
        warnings: early warnings, oldest first.
        readings: the last 256 readings.
        values: the newest value of each figure, under the names that are logged.
    """

    def __init__(  # noqa: PLR0913 - the public keywords of watch()
        self,
        model: nn.Module,
        optimizer: Any = None,
        *,
        settings: WatchSettings | None = None,
        on_bad: object = "stop",
        bundle: str | Path | None = None,
        scaler: Any = None,
        log: Any = None,
    ) -> None:
        """See :func:`watch`; without an optimizer, :meth:`bind` gives it one later."""
        self.called, self.model = model, plain_model(model)
        self.settings, self.log, self.scaler = settings or WatchSettings(), log, scaler
        given = optimizer if isinstance(optimizer, (list, tuple)) else [] if optimizer is None else [optimizer]
        self.optimizers = [plain_optimizer(each) for each in given]
        self.step = 0
        self.warnings: list[Alarm] = []
        self.readings: deque[Reading] = deque(maxlen=256)
        self.values: dict[str, float] = {}
        self._response = Response(checked_policy(on_bad), None if bundle is None else Path(bundle))
        self._ring, self._mailbox, self._judge = Ring(self.settings.ring), Mailbox(), Judge()
        self._gauges = Gauges(self.model)
        self._kept = Snapshots(self.model)
        self._updates = Updates(self.model)
        self._updated_at = self._forwards = 0
        self._initially_bad: tuple[str, ...] = ()
        self._stepped: set[int] = set()
        self._hidden: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._muted = False
        self._found_inf: Tensor | None = None
        self._stack = contextlib.ExitStack()

    @property
    def finding(self) -> Finding | None:
        """The finding of the first bad value, None so far."""
        return self._response.finding

    @property
    def bundle_path(self) -> Path | None:
        """The folder that was written for it."""
        return self._response.bundle_path

    @property
    def bad_steps(self) -> Sequence[int]:
        """Steps with a bad value; under `on_bad="skip"` those that were skipped."""
        return self._response.bad_steps

    def __enter__(self) -> Watch:  # noqa: PYI034 - Self is not in Python 3.10's typing
        """Attach the hooks."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(around_forward(self.called, self.before_forward, self.after_forward))
            for place, method in self._taps():
                stack.enter_context(listening(place, method))
            for optimizer in self.optimizers:
                stack.enter_context(around_step(optimizer, self.before_step, self.after_step))
            self._stack = stack.pop_all()
        weakref.finalize(self, self._stack.close)
        self._initially_bad = bad_parameters(self.model)
        return self

    def _taps(self) -> tuple[tuple[str, Any], ...]:
        heard = (("norm", self._on_norm), ("backward", self._on_backward), ("scaler", self._on_scaler))
        return (*heard, ("clip", self._kept.on_clip))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off, then look at what is still under way; an exception of the loop is never replaced."""
        self.close()
        if isinstance(error, NumericsError):
            return
        try:
            self._read(wait=True)
        except NumericsError:
            if error is None:
                raise

    def close(self) -> None:
        """Take every hook and patch off; a second time changes nothing."""
        self._stack.close()

    def bind(self, optimizer: Any) -> None:
        """Watch one more optimizer, made after the watch was opened."""
        inner = plain_optimizer(optimizer)
        if all(inner is not known for known in self.optimizers):
            self.optimizers.append(inner)
            if self._updated_at < self.step:
                self._kept.also(self.step, self.optimizers)
            self._stack.enter_context(around_step(inner, self.before_step, self.after_step))

    def before_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: of a new step if the last one was taken; its inputs go into the ring."""
        if self._muted or not torch.is_grad_enabled():
            return
        self._read()
        if self.step == 0 or self._stepped:
            self._next_step()
        self._ring.add(self.step, args, kwargs, self._gauges.device)
        self._look_at_ids(args, kwargs)

    def after_forward(self, output: Any) -> None:
        """A forward pass ended: its largest logit and its loss are sent for."""
        if not self._muted and torch.is_grad_enabled():
            self._ring.listen(output)
            if self._due:
                figures, limit = self._gauges.of_output(output, scaled=self._scaled)
                self._mailbox.post(self.step, figures, scaled=self._scaled, limit=limit)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to step."""
        if self.step == 0 or id(optimizer) in self._stepped:
            self._next_step()
        if self._due:
            scaled = self._scaled or hasattr(optimizer, "grad_scale")
            self._mailbox.post(self.step, self._gauges.of_gradients(optimizer), scaled=scaled)
        if self._parameters_due:
            self._gauges.before_update(optimizer)
        self._updates.before(optimizer, due=self._parameters_due)
        if self._kept.step:
            self._ring.note(self.step, self.optimizers.index(optimizer), rates_of(optimizer))
        # A fused optimizer is stepped all the same, and leaves out within its kernel what the scaler has found.
        found = getattr(optimizer, "found_inf", None)
        self._found_inf = found.detach().clone() if isinstance(found, Tensor) else None
        skipping = self._response.on_bad == "skip"
        # A device two steps behind has a whole step queued: a wait for it then leaves it busy, and bounds how late a bad value is reported.
        self._read(wait=skipping, through=self.step - 2)
        if skipping and self.step in self.bad_steps:
            # Without gradients an optimizer changes neither a parameter nor a state of its own.
            kept = [(p, p.grad) for p in parameters_of(optimizer) if p.grad is not None]
            self._hidden[id(optimizer)] = kept
            for parameter, _ in kept:
                parameter.grad = None

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer has stepped, or was kept from it."""
        hidden = self._hidden.pop(id(optimizer), None)
        for parameter, gradient in hidden or ():
            parameter.grad = gradient
        if hidden is None:
            self._updated_at = self.step
        self._stepped.add(id(optimizer))
        if self._parameters_due:
            self._mailbox.post(self.step, self._gauges.of_update(optimizer))
        self._mailbox.post(self.step, self._updates.after(optimizer))
        self._read()
        for alarm in self._updates.left_out(self.step, optimizer, self.optimizers):
            asked = alarm.kind in {UNREACHED, ZERO}
            found = self._asked(confirmed, alarm) if asked and self.finding is None else alarm
            if found is not None and self.finding is None:
                self._raise(found)

    @property
    def _due(self) -> bool:
        return (self.step - 1) % self.settings.every == 0

    @property
    def _parameters_due(self) -> bool:
        """Also at the first step, which an optimizer with an eps of 0 does not survive."""
        return self.step == 1 or self.step % self.settings.every_parameters == 0

    @property
    def _scaled(self) -> bool:
        return bool(self.scaler is not None and self.scaler.is_enabled())

    def _next_step(self) -> None:
        self.step += 1
        self._stepped.clear()
        self._gauges.new_step()
        every = self.settings.snapshot_every
        # The state before the first step costs one copy of a small model, and is what tells a batch from a state that went wrong.
        first = self.step == 1 and self._kept.is_small and not several_processes()
        if (first or (every and (self.step - 1) % every == 0)) and self.finding is None:
            # The copy waits for the device as well, and spoiled parameters must not replace good ones.
            self._read(wait=True)
            self._kept.take(self.step, self.optimizers)

    def _look_at_ids(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._forwards += 1
        if (alarm := inputs.refused(self.model, args, kwargs, self.step, first=self.finding is None)) is not None:
            self._raise(alarm)
        if self._forwards <= inputs.ID_BATCHES:
            self._mailbox.post(self.step, inputs.unrepresentable_ids(self.model, args, kwargs))

    def _on_norm(self, gradients: Sequence[Tensor], order: float, norm: Tensor) -> None:
        if not self._muted and self._due:
            self._gauges.take_norm(gradients, order, norm)

    def _on_backward(self, roots: Any) -> None:
        if not self._muted and self.step and self._due:
            self._mailbox.post(self.step, self._gauges.of_root(roots, self.scaler), scaled=self._scaled)

    def _on_scaler(self, scaler: Any, optimizer: Any, *, before: bool) -> None:
        """A GradScaler is about to step an optimizer of ours, or has decided whether to."""
        inner = plain_optimizer(optimizer)
        if all(inner is not known for known in self.optimizers) or not scaler.is_enabled():
            return
        if before:
            self.scaler = scaler
            scale = scaler._scale  # noqa: SLF001 - get_scale() would wait for the device
            if scale is not None:
                self._mailbox.post(max(self.step, 1), [("loss scale", scale.detach().clone())], scaled=True)
            return
        skipped = id(inner) not in self._stepped
        self._stepped.add(id(inner))
        found, self._found_inf = self._found_inf, None
        told = torch.tensor(float(skipped)) if found is None else found
        self._mailbox.post(max(self.step, 1), [("skipped step", told)], scaled=True)
        self._read()

    def _read(self, *, wait: bool = False, through: int = 0) -> None:
        for reading in self._mailbox.ready(wait=wait, through=through):
            self.readings.append(reading)
            values = logged(reading)
            self.values |= values
            send(self.log, values, reading.step)
            for alarm in self._judge.judge(reading):
                question = self._question(alarm)
                found = alarm if question is None else self._asked(question, alarm)
                if found is not None:
                    self._raise(found)
            if self.finding is None and (lost := self._updates.rounded(reading, self._updates.rate)) is not None:
                self._raise(lost)
            if 0.0 in reading.values.get(inputs.UNREPRESENTABLE, ()):
                seen = any(alarm.kind == "rounded-ids" for alarm in self.warnings)
                if not seen and (cast := inputs.rounded_ids(self.model, self._ring.of_step(reading.step))) is not None:
                    self._raise(cast)

    def _question(self, alarm: Alarm) -> Callable[[Alarm, CaughtContext], Alarm | None] | None:
        """What a replay has to show of an early sign before it is reported."""
        if self.finding is not None:
            return None
        if alarm.kind == HALVED and self._judge.halvings > HALVINGS_AT_START:
            return never_fits
        return diverged if alarm.kind == ROSE else None

    def _asked(self, question: Callable[[Alarm, CaughtContext], Alarm | None], alarm: Alarm) -> Alarm | None:
        """What the kept steps say when they are taken again."""
        self._muted = True
        try:
            return question(alarm, self._scene(alarm))
        finally:
            self._muted = False

    def _raise(self, alarm: Alarm) -> None:
        if not alarm.bad:
            self.warnings.append(alarm)
            early(alarm)
            return
        scene, self._muted = self._scene(alarm), True
        try:
            line = self._response.answer(alarm, scene, self._caught(alarm))
        finally:
            self._muted = False
        if line is not None:
            self.close()
            raise self._response.error(line)

    def _scene(self, alarm: Alarm) -> CaughtContext:
        scale = getattr(self.scaler, "_scale", None) if self._scaled else None
        alone = not several_processes() and not any(map(is_shard, self.model.parameters()))
        updated = self._updated_at >= alarm.step
        seen = CaughtValue(
            step=alarm.step,
            updated=updated,
            spoiled=not set(bad_parameters(self.model)) <= set(self._initially_bad),
            scaler=self.scaler if self._scaled else None,
            readings=self.readings,
            ring=self._ring,
        )
        silent = functools.partial(self._kept.now, silent=alarm.parameters)
        starts = silent if alarm.kind in ONGOING else self._kept.both if alarm.kind == ROSE else self._kept.starts
        return CaughtContext(
            model=self.model,
            optimizer=self.optimizers[0] if self.optimizers else None,
            calls=self._ring.of_step(alarm.step),
            starts=starts(seen, self.optimizers) if alone else (),
            snapshot=self._kept.parameters,
            snapshot_step=self._kept.step,
            updated=updated,
            initially_bad=self._initially_bad,
            scale=1.0 if scale is None else float(scale),
            replay=alone,
        )

    def _caught(self, alarm: Alarm) -> Caught:
        return Caught(
            calls=tuple(self._ring.calls),
            kind=alarm.kind,
            readings=tuple(self.readings),
            warnings=tuple(self.warnings),
            settings={**asdict(self.settings), "on_bad": self._response.policy},
        )


def watch(  # noqa: PLR0913 - the public keywords
    model: nn.Module,
    optimizer: Any,
    *,
    every: int = 1,
    every_parameters: int = 20,
    snapshot_every: int = 0,
    ring: int = 4,
    on_bad: OnBad = "stop",
    bundle: str | Path | None = None,
    scaler: Any = None,
    log: Any = None,
) -> Watch:
    """Watch a training loop, which stays as it is, from within a `with` block.

    Logits, loss, gradient norm and the ids' dtype are looked at in each step, the parameters' norm and the update-to-weight ratio in the first and
    then each `every_parameters`-th. The figures stay on the device and are read when they have arrived: at once on a CPU, else about a step later.

    Args:
        model: any module; also within DistributedDataParallel, accelerate, peft, FSDP2 or torch.compile.
        optimizer: of torch or accelerate's wrapper, or several.
        every: look at each so many-th step.
        every_parameters: at the parameters, each so many-th.
        snapshot_every: keep a copy of the parameters and of the optimizers' states on the CPU each so many steps; 0 keeps the one from before
            the first step alone, of parameters of at most 64 MiB. Without any, a value that is seen after the optimizer's step can only be
            sought in the forward pass, as long as the parameters are still finite. A ring of as many steps lets every step since the snapshot be taken again.
        ring: steps whose batches and random states are kept; the first 12 all are, while their inputs take at most 1 MiB.
        on_bad: what to do at the first bad value: `stop` raises :class:`NumericsError`, `warn` goes on, `skip` waits for the device
            before each step and keeps the optimizer from the bad ones (outside the bound on the watch's cost; an optimizer that takes a closure
            computes its gradients within the step and cannot be kept from it), a callable gets the finding and may return one of these words.
        bundle: folder to write at the first bad value; if it is taken, `-2`, `-3`, … is added.
        scaler: the GradScaler; found by itself at its first step.
        log: a SummaryWriter, or a function of (values, step).

    Raises:
        NumericsError: in the block, under `stop`.
        ValueError: a number or `on_bad` means nothing.
        TypeError: the optimizer is none.
    """
    settings = WatchSettings(every=every, every_parameters=every_parameters, snapshot_every=snapshot_every, ring=ring)
    return Watch(model, optimizer, settings=settings, on_bad=on_bad, bundle=bundle, scaler=scaler, log=log)
