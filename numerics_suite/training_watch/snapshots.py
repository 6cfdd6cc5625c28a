"""What is kept of a watched loop to begin again from, and the places from which a bad step can be replayed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.observations.finiteness import nonfinite_count
from numerics_suite.training_watch.alarms import Reading
from numerics_suite.training_watch.caught_step import Start
from numerics_suite.training_watch.norms import is_shard, local
from numerics_suite.training_watch.optimizer_states import Loop, OptimizerState, state_of
from numerics_suite.training_watch.ring import ForwardCall, Ring

SMALL_BYTES = 64 << 20
"""Parameters up to this size are copied without a request: before the first step, within a loop that stops, and into a bundle."""

GROWTH_INTERVAL, BACKOFF = 2000, 0.5
"""Of torch's GradScaler."""

FIRST_LOSSES = 8
"""The most losses that say where training began: the largest of them, as batches differ. Of fewer readings only the first half counts,
since what ends badly within a few steps has begun to by the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaughtValue:
    """What is known when a bad value was seen.

    Attributes:
        step: at which it arose.
        updated: an optimizer step was taken since.
        spoiled: by now parameters are not finite that were when the watch began.
        scaler: the GradScaler at work, None without one.
        readings: the last figures.
        ring: the last calls.
    """

    step: int
    updated: bool
    spoiled: bool
    scaler: Any
    readings: Sequence[Reading]
    ring: Ring


class Snapshots:
    """The last snapshot of one model and its optimizers, and how the loop clips.

    Attributes:
        parameters: as they were, on the CPU; empty without a snapshot.
        step: the step before which that was, 0 without one.
        max_norm: what the loop clips the total gradient norm to, None where it does not.
    """

    def __init__(self, model: nn.Module) -> None:
        """Nothing is kept yet."""
        self.model = model
        self.parameters: dict[str, Tensor] = {}
        self.step = 0
        self.max_norm: float | None = None
        self._optimizers: tuple[OptimizerState, ...] | None = None
        self._own = frozenset(map(id, model.parameters()))

    def on_clip(self, parameters: Any, max_norm: Any) -> None:
        """Somebody clips gradients, maybe of this model."""
        first = parameters[0] if isinstance(parameters, (list, tuple)) and parameters else parameters
        if id(first) in self._own and isinstance(max_norm, (int, float)):
            self.max_norm = float(max_norm)

    def take(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Copy everything; parameters that are spoiled already do not replace good ones."""
        copies = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        if self.parameters and any(nonfinite_count(local(value)) for value in copies.values()):
            return
        self.parameters, self.step, self._optimizers = copies, step, _states(self.model, optimizers)

    def also(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Add optimizers that became known only after the snapshot was taken; none of them has stepped since."""
        if self.parameters and self.step == step:
            self._optimizers = _states(self.model, optimizers)

    def starts(self, seen: CaughtValue, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Start, ...]:
        """Where the bad step can be replayed from, the one that shows most first."""
        starts = []
        calls = [call for call in seen.ring.calls if self.step <= call.step <= seen.step]
        if self.parameters and calls:
            whole = {call.step for call in calls} == set(range(self.step, seen.step + 1))
            gap = "" if whole else f" and the steps from {calls[0].step} on"
            words = f"the snapshot from before step {self.step}{gap}"
            kept = _start(words, calls, seen, self._loop(seen, calls[0].step, self._optimizers))
            starts.append(replace(kept, parameters=self.parameters, whole=whole))
        own = seen.ring.of_step(seen.step)
        if own and not seen.updated:
            loop = self._loop(seen, seen.step, _states(self.model, optimizers))
            starts.append(_start(f"the parameters of step {seen.step}", own, seen, loop))
        elif own and not starts and not seen.spoiled:
            starts.append(Start(words="the current parameters, a step later", calls=own, backward=False))
        return tuple(sorted(starts, key=lambda start: not start.whole))

    @property
    def is_small(self) -> bool:
        """Whether a copy is made without a request."""
        parameters = list(self.model.parameters())
        size = sum(p.numel() * p.element_size() for p in parameters)
        return size <= SMALL_BYTES and not any(is_shard(p) or p.is_meta for p in parameters)

    def both(self, seen: CaughtValue, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Start, ...]:
        """The state that was kept, and the state as it is, each over the kept steps."""
        kept = [start for start in self.starts(seen, optimizers) if start.parameters]
        return (*kept, *self.now(seen, optimizers, ()))

    def now(
        self, seen: CaughtValue, optimizers: Sequence[torch.optim.Optimizer], silent: Sequence[str]
    ) -> tuple[Start, ...]:
        """Where training that is finite and goes wrong can be taken further from: the parameters as they are, and the kept steps again.

        Args:
            seen: what is known.
            optimizers: of the loop, as they are now; what they hold of other models is left out.
            silent: parameters that do not move.
        """
        calls = list(seen.ring.calls)
        if not calls:
            return ()
        states = [state_of(self.model, optimizer, others=True) for optimizer in optimizers]
        held = tuple(state for state in states if state is not None)
        loop = self._loop(seen, calls[0].step, held) if len(held) == len(states) else None
        known = {name for state in held for names in state.names for name in names}
        start = _start(f"the parameters after step {seen.step}, over the kept steps again", calls, seen, loop)
        return (replace(start, unheld=tuple(name for name in silent if name not in known)),)

    def _loop(self, seen: CaughtValue, first: int, optimizers: tuple[OptimizerState, ...] | None) -> Loop | None:
        if not optimizers:
            return None
        scaled = seen.scaler is not None
        rates = {step: [noted[place] for place in sorted(noted)] for step, noted in seen.ring.rates.items()}
        return Loop(
            start=first,
            optimizers=optimizers,
            rates={step: each for step, each in rates.items() if len(each) == len(optimizers)},
            max_norm=self.max_norm,
            scaled=scaled,
            scale=_scale(seen, first),
            growth_interval=seen.scaler.get_growth_interval() if scaled else GROWTH_INTERVAL,
            backoff=_backoff(seen) if scaled else BACKOFF,
            began=_began(seen.readings, first),
            norms=_by_step([reading for reading in seen.readings if not reading.scaled], "gradient norm"),
        )


def _start(words: str, calls: Sequence[ForwardCall], seen: CaughtValue, loop: Loop | None) -> Start:
    return Start(words=words, calls=calls, loop=loop, scale=_scale(seen, calls[0].step))


def _scale(seen: CaughtValue, step: int) -> float:
    now = 1.0 if seen.scaler is None else float(seen.scaler.get_scale())
    return _by_step(seen.readings, "loss scale").get(step, now)


def _backoff(seen: CaughtValue) -> float:
    """By what the scale was multiplied at the last step that was skipped: loops that set it, or make a scaler for each step, have their own."""
    scales, skipped = _by_step(seen.readings, "loss scale"), _by_step(seen.readings, "skipped step")
    last = next((step for step in sorted(scales, reverse=True) if skipped.get(step - 1) and step - 1 in scales), None)
    own = float(seen.scaler.get_backoff_factor())
    return own if last is None else min(1.0, scales[last] / scales[last - 1])


def _began(readings: Sequence[Reading], start: int) -> float:
    losses = [loss for step, loss in sorted(_by_step(readings, "loss").items()) if step < start]
    return max(losses[: min(FIRST_LOSSES, -(-len(losses) // 2))], default=math.nan)


def _states(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[OptimizerState, ...] | None:
    found = [state_of(model, optimizer) for optimizer in optimizers]
    return tuple(each for each in found if each is not None) if all(each is not None for each in found) else None


def _by_step(readings: Sequence[Reading], name: str) -> Mapping[int, float]:
    return {
        reading.step: reading.values[name][0]
        for reading in readings
        if name in reading.values and math.isfinite(reading.values[name][0])
    }
