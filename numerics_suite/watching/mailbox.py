"""Figures on their way from the device: put in without waiting, taken out when they have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from numerics_suite.watching.alarms import Reading


@dataclass(slots=True)
class _Letter:
    """One copy under way."""

    step: int
    names: tuple[str, ...]
    host: Tensor
    event: Any
    scaled: bool
    limit: float

    def arrived(self) -> bool:
        return self.event is None or bool(self.event.query())

    def open(self) -> Reading:
        values: dict[str, tuple[float, ...]] = {}
        for name, value in zip(self.names, self.host.tolist(), strict=True):
            values[name] = (*values.get(name, ()), value)
        return Reading(step=self.step, values=values, scaled=self.scaled, limit=self.limit)


class Mailbox:
    """Letters in the order in which they were posted."""

    def __init__(self) -> None:
        """Empty."""
        self._letters: deque[_Letter] = deque()

    def post(
        self, step: int, figures: Sequence[tuple[str, Tensor]], *, scaled: bool = False, limit: float = float("inf")
    ) -> None:
        """Send scalars to the host; nothing waits for the device.

        Args:
            step: optimizer step.
            figures: names, and tensors of one element on any device.
            scaled: see :class:`Reading`.
            limit: see :class:`Reading`.
        """
        if not figures:
            return
        device = figures[0][1].device
        # Exact for every float that a device may hand over; mps has no float64.
        wide = torch.float32 if device.type == "mps" else torch.float64
        with torch.no_grad():
            parts = [value.detach().reshape(()).to(device, wide, non_blocking=True) for _, value in figures]
            packed = torch.stack(parts)
        host, event = _send(packed)
        names = tuple(name for name, _ in figures)
        self._letters.append(_Letter(step=step, names=names, host=host, event=event, scaled=scaled, limit=limit))

    def ready(self, *, wait: bool = False, through: int = 0) -> Iterator[Reading]:
        """The readings that have arrived, oldest first.

        Args:
            wait: for all of them.
            through: wait for those of the steps up to this one.
        """
        while self._letters:
            first = self._letters[0]
            if not first.arrived():
                if not wait and first.step > through:
                    return
                first.event.synchronize()
            self._letters.popleft()
            yield first.open()


def _send(packed: Tensor) -> tuple[Tensor, Any]:
    """The tensor on the host and the event that says when it is whole (None: it is)."""
    if packed.device.type == "cpu":
        return packed, None
    if packed.device.type != "cuda":
        # Without pinned memory a copy to the host waits by itself.
        return packed.cpu(), None
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(packed.device))
    return host, event
