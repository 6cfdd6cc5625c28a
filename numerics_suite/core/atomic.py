"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from numerics_suite.core.errors import BadInputError


def ensure_writable(path: Path, option: str) -> None:
    """See that a file can be written here, and write nothing.

    Raises:
        BadInputError: it cannot be written; the message names the file.
    """
    target = _target(path)
    try:
        if target.is_dir():
            message = f"{option}: cannot write {path}: it is a folder"
            raise BadInputError(message)
        if _is_special(target):
            if not os.access(target, os.W_OK):
                raise PermissionError(13, "Permission denied")
            return
        if target.exists():
            with target.open("ab"):
                pass
        descriptor, trial = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
        os.close(descriptor)
        Path(trial).unlink()
    except OSError as error:
        raise _refusal(path, option, error) from None


def write_atomic(path: Path, content: str | bytes, option: str = "") -> None:
    """Write a file: next to its place first, then moved there in one step.

    An error or an interruption leaves the earlier file, if any, as it was, and no other file.

    Args:
        path: of the file; a link is followed, a device or pipe is written directly.
        content: of the whole file; a text is written in UTF-8, what that has no place for (half a surrogate pair, as of a
            file name in another encoding) as its escape, which in JSON is the same letter.
        option: the option that named it, for the message.

    Raises:
        BadInputError: it cannot be written; the message names the file.
    """
    target = _target(path)
    raw = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        if _is_special(target):
            with target.open("wb") as file:
                file.write(raw)
            return
        _replace(target, raw)
    except OSError as error:
        raise _refusal(path, option, error) from None


def _replace(target: Path, content: bytes) -> None:
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{target.name[:100]}.", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(unfinished).chmod(_mode(target))
        Path(unfinished).replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(unfinished).unlink()
        raise


def _mode(target: Path) -> int:
    """The permissions that the file has, or that a new one would get; a temporary file is its owner's alone."""
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except OSError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _is_special(target: Path) -> bool:
    """A device or a pipe, which must not be replaced by a file."""
    return target.exists() and not target.is_file() and not target.is_dir()


def _refusal(path: Path, option: str, error: OSError) -> BadInputError:
    folder = Path(os.path.realpath(path)).parent
    why = f"no folder {folder}" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
    return BadInputError(f"{option}{': ' if option else ''}cannot write {path}: {why}")
