"""What long work is at, told while it lasts; standard library only.

Short work is never reported: a line comes after :data:`FIRST` seconds, and then each time that as long again has passed.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FIRST = threading.TIMEOUT_MAX if os.environ.get("NUMERICS_SUITE_NOTICES") == "off" else 10.0
"""Seconds of work that need no word. How many notices come depends on the machine; tests that compare whole outputs turn them off."""

_listeners: list[Callable[[str], object]] = []
_at: list[str] = []
"""What is being done, the innermost last: that alone is reported."""


@contextlib.contextmanager
def listening(say: Callable[[str], object]) -> Iterator[None]:
    """Inside this context the listener hears of long work.

    Args:
        say: takes one line, from any thread.
    """
    _listeners.append(say)
    try:
        yield
    finally:
        _listeners.remove(say)


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Work that may take long, reported to the listener.

    Args:
        what: in a few words, such as `loading glm4-9b in bf16`.
    """
    if not _listeners:
        yield
        return
    say, depth = _listeners[-1], len(_at)
    _at.append(what)

    def tell(seconds: float) -> None:
        if len(_at) == depth + 1:
            say(f"{_at[depth]}: {seconds:.0f} s so far")

    try:
        with telling(tell):
            yield
    finally:
        del _at[depth:]


def at(what: str) -> None:
    """How far the work that :func:`doing` began has come, in place of what was said of it.

    Args:
        what: in a few words, such as `forward.padding/glm4-9b/bf16, batch 3`.
    """
    if _at:
        _at[-1] = what


@contextlib.contextmanager
def telling(say: Callable[[float], object], first: float | None = None) -> Iterator[None]:
    """Tell that work goes on, more and more seldom: a log of hours stays short.

    Args:
        say: takes the seconds since the work began.
        first: seconds before it is called for the first time, None for :data:`FIRST`.
    """
    over, begun = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = FIRST if first is None else first
        while not over.wait(wait):
            say(time.monotonic() - begun)
            wait = time.monotonic() - begun

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
