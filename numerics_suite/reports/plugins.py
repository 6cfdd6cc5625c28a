"""Reporters that other packages add: functions of everything that a report covers, and of the folder that it goes to."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.extensions import REPORTERS, Extension, extensions, load
from numerics_suite.reports.documents import Documents

Reporter = Callable[[Documents, Path], Iterable[Path]]
"""Writes files into the folder, which is there, and gives their paths: the value of an entry point of `numerics_suite.reporters`."""


def added_reporters() -> Mapping[str, Reporter]:
    """The reporters of other packages, by name.

    Raises:
        BadInputError: one cannot be loaded, or is nothing that can be called.
    """
    return {name: _reporter(extension) for name, extension in extensions(REPORTERS).items()}


def _reporter(extension: Extension) -> Reporter:
    value: Reporter = load(extension)
    if not callable(value):
        extension.refuse(f"{extension.entry.value} is of type {type(value).__name__}, and must be a function")
    return value


def write_added(documents: Documents, folder: Path) -> tuple[Path, ...]:
    """Let every added reporter write; the paths of what they wrote.

    Raises:
        BadInputError: one fails; the message says whose it is.
    """
    return tuple(
        path for extension in extensions(REPORTERS).values() for path in _written(extension, documents, folder)
    )


def _written(extension: Extension, documents: Documents, folder: Path) -> list[Path]:
    reporter = _reporter(extension)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is no part of the answer
            return [Path(path) for path in reporter(documents, folder)]
    except BadInputError:
        raise  # a file that cannot be written is reported as such
    except Exception as error:  # noqa: BLE001 - whatever another's code does wrong
        extension.refuse(f"it failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
