"""A file with the answers so far that is whole at every moment, whatever ends the process."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from numerics_suite.core.atomic import write_atomic
from numerics_suite.core.errors import NumericsSuiteError

if TYPE_CHECKING:
    from collections.abc import Callable

INTERVAL = 1.0
"""Seconds between two writes, and so the longest that an answer is in no file."""


class AnswerFile:
    """Replaces one file by its newest content, at most once in :data:`INTERVAL` until it is finished."""

    def __init__(self, target: str | None, option: str = "--json") -> None:
        """Write nothing yet.

        Args:
            target: path of the file; `-` and None have no file, and then nothing is written.
            option: that named it, for the message.
        """
        self._path = Path(os.path.realpath(target)) if target and target != "-" else None
        if self._path is not None and self._path.exists() and not self._path.is_file():
            self._path = None  # a pipe or a device takes the answer once, at the end
        self._option = option
        self._lock = threading.Lock()
        self._newest: Callable[[], str] | None = None
        self._timer: threading.Timer | None = None
        self._written = float("-inf")
        self._earlier: bytes | None = None
        self._began = False

    def offer(self, make: Callable[[], str]) -> None:
        """Newer content; it is in the file within a second.

        Args:
            make: the whole content; may be called from another thread.
        """
        if self._path is None:
            return
        with self._lock:
            self._newest = make
            wait = self._written + INTERVAL - time.monotonic()
            if wait <= 0:
                self._write()
            elif self._timer is None:
                self._timer = threading.Timer(wait, self._late)
                self._timer.daemon = True
                self._timer.start()

    def flush(self) -> None:
        """Write the newest content now."""
        with self._lock:
            self._write()

    def close(self) -> None:
        """Write the newest content, and no more after it."""
        if self._path is None:
            return
        with self._lock:
            self._write()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def withdraw(self) -> None:
        """The run did not begin: leave what was there before."""
        self.close()
        if self._path is None or not self._began:
            return
        with contextlib.suppress(NumericsSuiteError, OSError):
            if self._earlier is None:
                self._path.unlink()
            else:
                write_atomic(self._path, self._earlier, self._option)

    def _late(self) -> None:
        with self._lock:
            self._timer = None
            self._write()

    def _write(self) -> None:
        make, self._newest = self._newest, None
        if make is None or self._path is None:
            return
        if not self._began:
            self._began = True
            with contextlib.suppress(OSError):
                self._earlier = self._path.read_bytes()
        # A disk that is full for a while ends no run; the last write, the command's own, reports it.
        with contextlib.suppress(NumericsSuiteError):
            write_atomic(self._path, make(), self._option)
        self._written = time.monotonic()
