"""SIGTERM, Ctrl-C and a terminal that closes as one request to stop, which no code under test can swallow or fake."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SAME = 1.0
"""Seconds in which further signals are the same request: a terminal, `timeout` and a parent process each send their own."""


class _Request:
    """What this process was asked for."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.active = False


_request = _Request()


def requested() -> bool:
    """Whether the user, or whoever runs this process, asked it to stop."""
    return _request.at is not None


def stop_if_requested() -> None:
    """Stop here if that was asked for.

    The interrupt may have arrived where an exception is lost, as in a destructor or in a model that catches everything.

    Raises:
        KeyboardInterrupt: it was.
    """
    if requested():
        raise KeyboardInterrupt


def stop_signals() -> tuple[signal.Signals, ...]:
    """Those that ask for an end; SIGHUP, the end of the terminal, only where `nohup` does not have it ignored."""
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    heeded = hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGINT, *((hangup,) if heeded else ()))


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Each of them raises KeyboardInterrupt, once for each request; a request inside one that lasts changes nothing."""
    if _request.active or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in stop_signals()}
    lost = sys.unraisablehook
    sys.unraisablehook = lambda told: None if _is_ours(told) else lost(told)
    _request.at, _request.active = None, True
    for number in before:
        signal.signal(number, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        sys.unraisablehook = lost
        _request.at, _request.active = None, False


def _is_ours(told: sys.UnraisableHookArgs) -> bool:
    """Whether this is the interrupt, raised where exceptions are lost, as in a destructor: Python would print a traceback of it."""
    return requested() and issubclass(told.exc_type, KeyboardInterrupt)


def _interrupt(number: int, _frame: object) -> None:
    now, earlier = time.monotonic(), _request.at
    _request.at = earlier if earlier is not None else now
    if earlier is None or (number == signal.SIGINT and now - earlier > SAME):
        raise KeyboardInterrupt
