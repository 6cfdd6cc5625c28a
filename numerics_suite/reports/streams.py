"""What to do with a stream whose reader is gone or whose disk is full."""

from __future__ import annotations

import os
from typing import IO


def abandon(stream: IO[str]) -> None:
    """Send what the stream still holds nowhere, so that the interpreter's last flush does not fail."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        pass  # a stream without a descriptor has nothing to flush
