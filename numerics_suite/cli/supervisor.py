"""A small process that watches the run, and reports however it ends.

It forks before anything heavy is imported, so it costs a millisecond and a few megabytes. Where the run dies inside a
cell, it begins again in a new process, with the answers that were there, and leaves that cell out.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numerics_suite.core.deaths import RSS_UNIT, death_text
from numerics_suite.core.interrupts import stop_signals
from numerics_suite.core.lifeline import EarlierAnswers, Lifeline, hold, lifeline
from numerics_suite.core.text import harmless

if TYPE_CHECKING:
    from collections.abc import Callable

SUPERVISED = {"check", "record", "matrix", "bisect"}
"""Commands that run models; `watch` is the user's own script, whose signals and process are its own."""

INTERRUPTED, INTERNAL = 2, 3
GRACE = 20.0
"""Seconds that a run has to end after a request to stop, or after its exit status came."""


@dataclass(slots=True)
class _Run:
    """One process of the run, seen from outside."""

    pid: int
    known: EarlierAnswers
    status: int | None = None
    at: list[str] | None = None
    ended: float | None = None
    unread: bytes = b""

    def read(self, content: bytes) -> None:
        """Take in its messages."""
        *lines, self.unread = (self.unread + content).split(b"\n")
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            if "asking" in message:
                self.at = message["asking"]
            elif "answer" in message:
                self.known.answers[message["answer"]["id"]] = message["answer"]
                self.at = None
            else:
                self.status, self.ended = message["ended"], time.monotonic()


def supervised(arguments: list[str], main: Callable[[list[str]], int]) -> int:
    """Run a command in a process of its own and return its exit status."""
    if not hasattr(os, "fork") or threading.active_count() > 1:
        return main(arguments)
    known = EarlierAnswers()
    signals = _Signals()
    while True:
        run, ending, peak = _one(arguments, main, known, signals)
        if run is None:
            return ending  # in the child: its own status
        if run.status is not None:
            return run.status
        how = death_text(ending, peak)
        if signals.since is not None:
            return _tell(INTERRUPTED, f"interrupted; the run was {how}")
        if run.at is None or run.at[0] in known.lost:
            return _tell(INTERNAL, f"internal error: the process of the run was {how}")
        cell, check = run.at
        known.lost[cell] = f"the process was {how}, in {check}"
        _tell(INTERNAL, f"the process was {how}, in {check} of {cell}; what is left runs in a new one")


def _tell(status: int, text: str) -> int:
    try:
        sys.stderr.write(f"numerics-suite: {harmless(text)}\n")
        sys.stderr.flush()
    except OSError:
        pass  # no reader is left
    return status


class _Signals:
    """Hands the signals of this process on to the run.

    Attributes:
        since: when the first one came, None before.
    """

    def __init__(self) -> None:
        self.since: float | None = None
        self.pid: int | None = None

    def __call__(self, number: int, _frame: object) -> None:
        self.since = self.since or time.monotonic()
        if self.pid is not None:
            os.kill(self.pid, number)


def _one(
    arguments: list[str], main: Callable[[list[str]], int], known: EarlierAnswers, signals: _Signals
) -> tuple[_Run | None, int, int | None]:
    """Fork and follow one process: its messages, how it ended and its peak memory; in that process None and its status."""
    told, telling = os.pipe()
    alive, living = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    handed_on = stop_signals()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, handed_on)
    before = {number: signal.signal(number, signals) for number in handed_on}
    pid = os.fork()
    if pid == 0:
        os.close(told)
        os.close(living)
        for number, handler in before.items():
            signal.signal(number, handler)
        hold(Lifeline(telling), known)
        _end_with(alive)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        return None, _child(arguments, main), None
    signals.pid = pid
    os.close(telling)
    os.close(alive)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    run = _Run(pid, known)
    try:
        ending, peak = _follow(run, told, signals)
    finally:
        signals.pid = None
        os.close(told)
        os.close(living)
        for number, handler in before.items():
            signal.signal(number, handler)
    return run, ending, peak


def _child(arguments: list[str], main: Callable[[list[str]], int]) -> int:
    status = main(arguments)
    mine = lifeline()
    assert mine is not None
    mine.ended(status)
    return status


def _end_with(alive: int) -> None:
    """Stop this process when the one that watches over it is gone: the pipe closes then."""

    def watch() -> None:
        while os.read(alive, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(INTERRUPTED)

    threading.Thread(target=watch, daemon=True).start()


def _follow(run: _Run, told: int, signals: _Signals) -> tuple[int, int]:
    """Read until the process has ended, or has to be ended; its status as `Popen.returncode` has it, and its peak in bytes."""
    open_ = True
    while True:
        # A process that it left behind may hold the pipe open, so its end is also asked for.
        pid, status, usage = os.wait4(run.pid, os.WNOHANG)
        if pid:
            while open_ and select.select([told], [], [], 0)[0] and (content := os.read(told, 1 << 16)):
                run.read(content)
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss * RSS_UNIT
        due = run.ended or signals.since
        if due is not None and time.monotonic() - due > GRACE:
            os.kill(run.pid, signal.SIGKILL)
        if open_ and select.select([told], [], [], 0.2)[0]:
            content = os.read(told, 1 << 16)
            open_ = bool(content)
            run.read(content)
        elif not open_:
            time.sleep(0.01)
