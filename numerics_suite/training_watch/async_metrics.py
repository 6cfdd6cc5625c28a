"""Figures on their way from the device: put in without waiting, taken out when they have arrived."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from numerics_suite.devices.device import has_float64
from numerics_suite.devices.host_copy import copy_to_host
from numerics_suite.training_watch.alarms import Reading


@dataclass(slots=True)
class _Letter:
    """One copy under way."""

    step: int
    copies: tuple[tuple[tuple[str, ...], Tensor, Any], ...]
    """Names, values on the host, and the event after which they may be read: one for each device."""
    scaled: bool
    limit: float

    def arrived(self) -> bool:
        return all(event is None or bool(event.query()) for _, _, event in self.copies)

    def wait(self) -> None:
        for _, _, event in self.copies:
            if event is not None:
                event.synchronize()

    def open(self) -> Reading:
        values: dict[str, tuple[float, ...]] = {}
        for names, host, _ in self.copies:
            for name, value in zip(names, host.tolist(), strict=True):
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
        """Send scalars to the host; nothing waits for the device."""
        if not figures:
            return
        sent = []
        # One copy from each device: a value of another one would have to be waited for before it could be packed.
        for device in dict.fromkeys(value.device for _, value in figures):
            own = [(name, value) for name, value in figures if value.device == device]
            # float64 is exact for every float that a device may hand over; one without it hands over no wider float.
            wide = torch.float64 if has_float64(device) else torch.float32
            with torch.no_grad():
                packed = torch.stack([value.detach().reshape(()).to(wide) for _, value in own])
            sent.append((tuple(name for name, _ in own), *copy_to_host(packed)))
        self._letters.append(_Letter(step=step, copies=tuple(sent), scaled=scaled, limit=limit))

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
                first.wait()
            self._letters.popleft()
            yield first.open()
