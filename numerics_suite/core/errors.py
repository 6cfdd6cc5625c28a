"""The failures that the tool tells apart, each with one meaning for the exit status."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class NumericsSuiteError(Exception):
    """Base of every error that this package raises on purpose; its text is one line for a person."""


class BadInputError(NumericsSuiteError):
    """The user's input cannot be used: one line that names the file, the key and the fix; exit status 4."""


class NotApplicableError(NumericsSuiteError):
    """A check has nothing to ask of this cell; the text is the reason that the skip shows."""


class UnsupportedError(NumericsSuiteError):
    """The installed packages or the device cannot run this cell; the text is the reason that the skip shows."""


class CheckError(NumericsSuiteError):
    """A check could not be carried out (not a finding): status `error`, exit status 3."""


class UnusableError(CheckError):
    """No model can be loaded of a checkpoint, though its files passed every look: bad input that only a load could tell.

    Its questions have status `error`, so that other subjects keep their answers; exit status 4 where nothing else went wrong.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The phrase ``; did you mean 'x'?`` for the known name closest to `name`, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{match[0]}'?" if match else ""
