"""What a run tells the process that watches over it, so that its answers outlive it; standard library only.

A process that is killed, or that the code under test ends (`os._exit`, a crash in a kernel), cannot report anything. So it says
beforehand what it is about to do, and every answer as soon as it is there.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class EarlierAnswers:
    """What earlier processes of this run left.

    Attributes:
        answers: entries of `checks` of the results file, by id.
        lost: how the process ended that ran a cell, or that called a factory, by the cell's id or the factory's SUBJECT; neither
            is run again.
    """

    answers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


class Lifeline:
    """The writing end, in the process that runs."""

    def __init__(self, descriptor: int) -> None:
        """Write to this descriptor."""
        self._descriptor = descriptor

    def asking(self, cell: str, check: str) -> None:
        """A check of a cell begins."""
        self._tell({"asking": [cell, check]})

    def idle(self) -> None:
        """Nothing is run that belongs to one cell."""
        self._tell({"asking": None})

    def answered(self, entry: Mapping[str, Any]) -> None:
        """An answer is there, as an entry of `checks`."""
        self._tell({"answer": entry})

    def ended(self, status: int) -> None:
        """The run has come to its end: only now does its exit status count."""
        self._tell({"ended": status})

    def _tell(self, message: Mapping[str, Any]) -> None:
        content = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):  # the other end is gone
            while content:
                content = content[os.write(self._descriptor, content) :]


_held: list[Lifeline] = []
_known = EarlierAnswers()


def known() -> EarlierAnswers:
    """What earlier processes of this run left; empty in the first one."""
    return _known


def hold(lifeline: Lifeline, earlier: EarlierAnswers) -> None:
    """From now on this process tells what it does."""
    _held[:] = [lifeline]
    _known.answers.update(earlier.answers)
    _known.lost.update(earlier.lost)


def lifeline() -> Lifeline | None:
    """The lifeline of this process, None without a supervisor."""
    return _held[0] if _held else None
