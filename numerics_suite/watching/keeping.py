"""What is kept of a watched loop to begin again from, and the places from which a bad step can be replayed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.observing.finiteness import nonfinite_count
from numerics_suite.watching.alarms import Reading
from numerics_suite.watching.retraining import Kept, Start
from numerics_suite.watching.ring import Call, Ring
from numerics_suite.watching.stepping import Loop, Stepping, stepping_of

GROWTH_INTERVAL = 2000
"""Of torch's GradScaler."""

FIRST_LOSSES = 8
"""The most losses that say where training began: the largest of them, as batches differ. Of fewer readings only the first half counts,
since what ends badly within a few steps has begun to by the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
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


class Keeping:
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
        self._optimizers: tuple[Stepping, ...] | None = None
        self._own = frozenset(map(id, model.parameters()))

    def on_clip(self, parameters: Any, max_norm: Any) -> None:
        """Somebody clips gradients, maybe of this model."""
        first = parameters[0] if isinstance(parameters, (list, tuple)) and parameters else parameters
        if id(first) in self._own and isinstance(max_norm, (int, float)):
            self.max_norm = float(max_norm)

    def take(self, step: int, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Copy everything; parameters that are spoiled already do not replace good ones.

        Args:
            step: the step that is about to begin.
            optimizers: of the loop.
        """
        copies = {name: p.detach().to("cpu", copy=True) for name, p in self.model.named_parameters()}
        if self.parameters and any(nonfinite_count(_plain(value)) for value in copies.values()):
            return
        self.parameters, self.step, self._optimizers = copies, step, _steppings(self.model, optimizers)

    def starts(self, seen: Seen, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Start, ...]:
        """Where the bad step can be replayed from, the one that shows most first.

        Args:
            seen: what is known of the bad value.
            optimizers: of the loop, as they are now.
        """
        starts = []
        calls = [call for call in seen.ring.calls if self.step <= call.step <= seen.step]
        if self.parameters and calls:
            whole = {call.step for call in calls} == set(range(self.step, seen.step + 1))
            gap = "" if whole else f" and the steps from {calls[0].step} on"
            words = f"the snapshot from before step {self.step}{gap}"
            kept = self._of(seen, calls, self._optimizers)
            starts.append(Start(words=words, kept=kept, parameters=self.parameters, whole=whole))
        own = seen.ring.of_step(seen.step)
        if own and not seen.updated:
            kept = self._of(seen, own, _steppings(self.model, optimizers))
            starts.append(Start(words=f"the parameters of step {seen.step}", kept=kept))
        elif own and not starts and not seen.spoiled:
            words = "the current parameters, a step later"
            starts.append(Start(words=words, kept=Kept(calls=own, backward=False)))
        return tuple(sorted(starts, key=lambda start: not start.whole))

    def _of(self, seen: Seen, calls: Sequence[Call], optimizers: tuple[Stepping, ...] | None) -> Kept:
        scaled = seen.scaler is not None
        scales = _by_step(seen.readings, "loss scale")
        scale = scales.get(calls[0].step, float(seen.scaler.get_scale()) if scaled else 1.0)
        if not optimizers:
            return Kept(calls=calls, scale=scale)
        rates = {step: [noted[place] for place in sorted(noted)] for step, noted in seen.ring.rates.items()}
        loop = Loop(
            start=calls[0].step,
            optimizers=optimizers,
            rates={step: each for step, each in rates.items() if len(each) == len(optimizers)},
            max_norm=self.max_norm,
            scaled=scaled,
            scale=scale,
            growth_interval=seen.scaler.get_growth_interval() if scaled else GROWTH_INTERVAL,
            began=_began(seen.readings, calls[0].step),
            norms=_by_step([reading for reading in seen.readings if not reading.scaled], "gradient norm"),
        )
        return Kept(calls=calls, loop=loop, scale=scale)


def _began(readings: Sequence[Reading], start: int) -> float:
    losses = [loss for step, loss in sorted(_by_step(readings, "loss").items()) if step < start]
    return max(losses[: min(FIRST_LOSSES, -(-len(losses) // 2))], default=math.nan)


def _steppings(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Stepping, ...] | None:
    found = [stepping_of(model, optimizer) for optimizer in optimizers]
    return tuple(each for each in found if each is not None) if all(each is not None for each in found) else None


def _by_step(readings: Sequence[Reading], name: str) -> Mapping[int, float]:
    return {
        reading.step: reading.values[name][0]
        for reading in readings
        if name in reading.values and math.isfinite(reading.values[name][0])
    }


def _plain(value: Tensor) -> Tensor:
    return getattr(value, "_local_tensor", value)
