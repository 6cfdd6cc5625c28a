"""Who makes or uses an environment? File locks, which the system releases when a process ends, however it ends.

An environment has one lock for making and removing it, and one file per process that uses it, locked by that process. A
lock that many may share would be the plain way; the portable ones have none.
"""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from numerics_suite.core.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from filelock import BaseFileLock


def file_lock(path: Path) -> BaseFileLock:
    """A lock in a file, not taken yet."""
    try:
        from filelock import FileLock
    except ImportError:
        message = "environments per version need filelock, which torch brings: pip install filelock"
        raise BadInputError(message) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path, thread_local=False)


@contextlib.contextmanager
def alone(folder: Path, name: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lock for making and removing an environment; wait for it if need be."""
    from filelock import Timeout

    lock = file_lock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if on_wait is not None:
            on_wait()
        lock.acquire(poll_interval=0.02)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def alone_if_free(folder: Path, name: str) -> Iterator[bool]:
    """Whether the lock was free and is held while this lasts."""
    from filelock import Timeout

    lock = file_lock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


class Use:
    """While this is held, the environment is not removed. However often a process uses one, it locks one file."""

    _held: ClassVar[dict[Path, tuple[BaseFileLock, int]]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, folder: Path, name: str) -> None:
        """Begin to use it; the caller holds the lock of `alone`."""
        self._path = folder / f"{name}.use-{os.getpid()}"
        self._ended = False
        with self._guard:
            lock, count = self._held.get(self._path, (None, 0))
            if lock is None:
                lock = file_lock(self._path)
                lock.acquire(timeout=0)
            self._held[self._path] = (lock, count + 1)

    def end(self) -> None:
        """Use it no more; the end of the process does the same."""
        with self._guard:
            if self._ended:
                return
            self._ended = True
            lock, count = self._held.pop(self._path)
            if count > 1:
                self._held[self._path] = (lock, count - 1)
                return
            lock.release()
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)


def is_used(folder: Path, name: str) -> bool:
    """Whether any process uses the environment; what dead processes left behind is removed.

    The caller holds the lock of `alone`, so no use begins meanwhile.
    """
    from filelock import Timeout

    used = False
    for path in folder.glob(f"{_escaped(name)}.use-*"):
        lock = file_lock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            used = True
            continue
        lock.release()
        path.unlink(missing_ok=True)
    return used


def _escaped(name: str) -> str:
    import glob

    return glob.escape(name)
