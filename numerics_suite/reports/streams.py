"""What to do with a stream whose reader is gone or whose disk is full."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import IO

from numerics_suite.core.text import harmless


def notice(text: str) -> None:
    """One line on how far long work is, on standard error: it depends on the machine's speed, and is no part of any answer."""
    stream = _uncaptured[-1] if _uncaptured else sys.stderr
    try:
        stream.write(f"numerics-suite: {harmless(text)}\n")
        stream.flush()
    except OSError:
        abandon(stream)


_uncaptured: list[IO[str]] = []


@contextlib.contextmanager
def notices_past_capture() -> Iterator[None]:
    """While this lasts, notices reach today's standard error, though pytest puts a file in its place for each test."""
    try:
        stream = os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError):  # a stream without a descriptor cannot be captured by one
        yield
        return
    _uncaptured.append(stream)
    try:
        yield
    finally:
        _uncaptured.remove(stream)
        with contextlib.suppress(OSError):
            stream.close()


def abandon(stream: IO[str]) -> None:
    """Send what the stream still holds nowhere, so that the interpreter's last flush does not fail."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass  # a stream without a descriptor has nothing to flush
