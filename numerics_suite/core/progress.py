"""Which check of which cell is being asked at this moment, and at which batch it is; standard library only.

A worker process has no other way to say so before its check is answered, so it leaves a file of one line in a folder of the
run; what is read there is shown and decides nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class AtWork:
    """What one process is at.

    Attributes:
        batch: number of the batch from 1, 0 before the first one.
        of: batches that are drawn, 0 for a check without.
    """

    check: str
    cell: str
    batch: int = 0
    of: int = 0

    def __str__(self) -> str:
        """`forward.cache, batch 3 of 10`; more than was planned while a failing batch is made smaller."""
        if not self.batch:
            return self.check
        return f"{self.check}, batch {self.batch}" + (
            f" of {self.of}" if self.batch <= self.of else ", making it smaller"
        )


class _State:
    def __init__(self) -> None:
        self.now: AtWork | None = None
        self.file: Path | None = None


_state = _State()


def tell_in(folder: Path | None) -> None:
    """From now on, leave in a folder what this process is at."""
    _state.file = None if folder is None else folder / f"{os.getpid()}.json"


def begin(check: str, cell: str) -> None:
    """A check is asked."""
    _set(AtWork(check=check, cell=cell))


def batch(number: int, of: int) -> None:
    """The check that is being asked has come to a batch."""
    if _state.now is not None:
        _set(replace(_state.now, batch=number, of=of))


def end() -> None:
    """Nothing is asked."""
    _set(None)


def _set(now: AtWork | None) -> None:
    _state.now = now
    if _state.file is not None:
        with contextlib.suppress(OSError):  # a full disk hides the progress and nothing else
            _state.file.write_text(json.dumps(now and asdict(now)), encoding="utf-8")


def at_work(folder: Path | None = None) -> tuple[AtWork, ...]:
    """What this process and those that tell in the folder are at."""
    found = [] if _state.now is None else [_state.now]
    for file in sorted(folder.glob("*.json")) if folder is not None else ():
        with contextlib.suppress(OSError, ValueError, TypeError):  # written to, or gone, this very moment
            content = json.loads(file.read_text(encoding="utf-8"))
            if content is not None:
                found.append(AtWork(**content))
    return tuple(found)
