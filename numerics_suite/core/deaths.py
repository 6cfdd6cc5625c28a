"""How a process ended that was not meant to."""

from __future__ import annotations

import signal
import sys

RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes of one unit of `ru_maxrss`: getrusage(2) of Linux counts in KiB, that of macOS in bytes."""


def peak_of_children() -> int | None:
    """The most bytes that any process held which this one started and which has ended, None where the system counts none."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * RSS_UNIT


def death_text(status: int, peak_bytes: int | None = None) -> str:
    """The end of a process in words.

    Args:
        status: as `Popen.returncode`: the exit status, or minus the signal.
        peak_bytes: the most memory that it held, where that is known.
    """
    if status >= 0:
        return f"ended with exit status {status} before it had an answer (sys.exit, os._exit, or a library's abort)"
    number = -status
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    if number != signal.SIGKILL:
        return f"ended by {name}"
    # Nothing but the kernel's log tells who sent SIGKILL; on a machine that works, it is the kernel out of memory.
    used = "" if peak_bytes is None else f": {peak_bytes / 1e9:.1f} GB in use"
    return f"killed, probably out of memory{used} ({name})"
