"""The folder in which finished answers are kept, so that a second run goes on where the first was stopped.

An answer is made under `.unfinished/` and moved to its name in one step when its process has ended, so a folder with a
name is whole, whenever the run was killed.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.versions.job import DONE, RESULTS
from numerics_suite.versions.locks import file_lock

if TYPE_CHECKING:
    from types import TracebackType

    from filelock import BaseFileLock
    from typing_extensions import Self

UNFINISHED, LOCK = ".unfinished", ".lock"


class ResultStore:
    """Answers by name. One run at a time holds it.

    Attributes:
        folder: where they are.
    """

    def __init__(self, folder: Path, option: str = "--out") -> None:
        """Nothing is made before it is entered."""
        self.folder, self._option = folder.resolve(), option
        self._lock: BaseFileLock | None = None

    def __enter__(self) -> Self:
        """Make the folder, take its lock, and drop what a killed run left unfinished.

        Raises:
            BadInputError: it cannot be written, or another run holds it.
        """
        from filelock import Timeout

        try:
            (self.folder / UNFINISHED).mkdir(parents=True, exist_ok=True)
            Path(tempfile.mkdtemp(dir=self.folder / UNFINISHED)).rmdir()
            self._lock = file_lock(self.folder / LOCK)
            self._lock.acquire(timeout=0)
        except Timeout:
            self._lock = None
            message = f"{self._option}: another run is writing {self.folder}; wait for it, or give this one a folder of its own"
            raise BadInputError(message) from None
        except OSError as error:
            self._lock = None
            why = error.strerror or str(error)
            message = f"{self._option}: cannot write {self.folder}: {why}"
            raise BadInputError(message) from None
        for left in (self.folder / UNFINISHED).iterdir():
            shutil.rmtree(left, ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the lock back."""
        with contextlib.suppress(OSError):
            (self.folder / UNFINISHED).rmdir()
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def find(self, name: str) -> dict[str, Any] | None:
        """The `done.json` of a finished answer that was no error, None where there is none."""
        folder = self.folder / name
        done = read_done(folder)
        if done is None or done["status"] == "error":
            return None
        whole = (folder / RESULTS).is_file() or not done["results"]
        return done if whole else None

    def count(self) -> int:
        """How many answers there are."""
        return sum(read_done(folder) is not None for folder in self.folder.iterdir() if folder.is_dir())

    def begin(self, name: str) -> Path:
        """A new folder to work in."""
        (self.folder / UNFINISHED).mkdir(exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=self.folder / UNFINISHED))

    @staticmethod
    def drop(unfinished: Path) -> None:
        """Remove a folder that came to nothing."""
        shutil.rmtree(unfinished, ignore_errors=True)

    def publish(self, name: str, unfinished: Path) -> Path:
        """Give a finished folder its name; what an earlier error left there goes."""
        target = self.folder / name
        unfinished.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=self.folder / UNFINISHED))
            target.rename(old / "old")
            shutil.rmtree(old, ignore_errors=True)
        unfinished.rename(target)
        return target


def read_done(folder: Path) -> dict[str, Any] | None:
    """The `done.json` of a folder, None where there is none that can be read."""
    try:
        done = json.loads((folder / DONE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return done if isinstance(done, dict) and {"status", "results", "reason"} <= set(done) else None
