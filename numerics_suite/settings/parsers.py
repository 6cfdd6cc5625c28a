"""From the text of one option to its value; a text that cannot be used raises ValueError with the reason and the fix."""

from __future__ import annotations

import fnmatch
import math
import re
from typing import TYPE_CHECKING, Literal

from numerics_suite.core.errors import nearest
from numerics_suite.core.extensions import CHECKS, installed_names
from numerics_suite.core.registry import own_check_ids
from numerics_suite.settings.choices import TRAIN_SCOPES

if TYPE_CHECKING:
    from collections.abc import Callable

LARGEST_SEED = 2**32 - 1
"""The largest seed that numpy, torch and Hypothesis all take."""


def text(value: str) -> str:
    """Any text but an empty one."""
    if not value.strip():
        message = "must not be empty"
        raise ValueError(message)
    return value


def one_of(kind: str, known: tuple[str, ...]) -> Callable[[str], str]:
    """A parser that takes one of the known names."""

    def parse(value: str) -> str:
        if value not in known:
            message = f"unknown {kind} '{value}'{nearest(value, known)} (known: {', '.join(known)})"
            raise ValueError(message)
        return value

    return parse


def integer(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers from `least` to `most`."""
    wanted = f"a whole number of at least {least}" if most is None else f"a whole number from {least} to {most}"

    def parse(value: str) -> int:
        message = f"must be {wanted}, not '{value}'"
        if not re.fullmatch(r"\s*[+-]?[0-9]+\s*", value):
            raise ValueError(message)
        number = int(value)
        if number < least or (most is not None and number > most):
            raise ValueError(message)
        return number

    return parse


def positive(value: str) -> float:
    """A finite number above 0."""
    message = f"must be a number above 0, not '{value}'"
    try:
        number = float(value)
    except ValueError:
        raise ValueError(message) from None
    if not (math.isfinite(number) and number > 0):
        raise ValueError(message)
    return number


def workers(value: str) -> int | Literal["auto"]:
    """`auto`, or the number of worker processes; 0 runs in the process itself."""
    if value == "auto":
        return "auto"
    try:
        return integer(0)(value)
    except ValueError:
        message = f"must be 'auto' or a whole number of at least 0, not '{value}'"
        raise ValueError(message) from None


def device(value: str) -> str:
    """`auto`, `cpu`, `cuda`, `cuda:1`, `cuda:0,cuda:1`, …; which there are is torch's to say, when the run begins."""
    parts = [part.strip() for part in value.split(",")]
    for part in parts:
        if not re.fullmatch(r"[a-z][a-z0-9_]*(:\d+)?", part) or re.fullmatch(r"(auto|cpu):\d+", part):
            message = f"'{value}' is no device; write auto, cpu, a kind such as cuda, or an index as in cuda:0"
            raise ValueError(message)
    return ",".join(parts)


def train_scope(value: str) -> str:
    """`auto`, `full`, `head`, `last:K` or `lora`."""
    if value in {"auto", "full", "head", "lora"}:
        return value
    if re.fullmatch(r"last:0*[1-9][0-9]*", value):
        return value
    if value.partition(":")[0] == "last":
        message = f"'{value}' needs a number of blocks of at least 1, as in last:2"
    else:
        message = f"unknown scope '{value}'{nearest(value, TRAIN_SCOPES)} (known: {', '.join(TRAIN_SCOPES)})"
    raise ValueError(message)


def layers(value: str) -> str:
    """`first:N` or `every:N`."""
    if re.fullmatch(r"(first|every):0*[1-9][0-9]*", value):
        return value
    message = f"must be first:N or every:N with N of at least 1, not '{value}'"
    raise ValueError(message)


def check_glob(value: str) -> str:
    """A check id or a glob over check ids that matches at least one, of ours or of any other package that is installed."""
    ids = own_check_ids()
    if any(fnmatch.fnmatchcase(check, value) for check in ids):
        return value
    # Asked only where ours do not answer: it takes longer to look them up than to do all else that options need.
    ids = (*ids, *installed_names(CHECKS))
    if any(fnmatch.fnmatchcase(check, value) for check in ids):
        return value
    message = f"no check matches '{value}'{_meant(value, ids)}"
    raise ValueError(message)


def _meant(value: str, ids: tuple[str, ...]) -> str:
    """What a glob that matches nothing may be a slip of."""
    groups = {check.partition(".")[0] for check in ids}
    prefix, dot, _ = value.partition(".")
    if value in groups:
        return f"; did you mean '{value}.*'?"
    if dot and re.fullmatch(r"[a-z][a-z0-9-]*", prefix) and not nearest(prefix, groups):
        return f"; checks of '{prefix}' come with another package, which is not installed here"
    return nearest(value, ids) or nearest(prefix, groups)


def name(value: str) -> str:
    """A subject's name, which becomes part of ids: no spaces, no control characters."""
    if not value or not value.isprintable() or any(letter.isspace() for letter in value):
        message = f"'{value}' is no name; use letters, digits, '.', '_' and '-'"
        raise ValueError(message)
    return value


def switch(value: str) -> bool:
    """`true` or `false`."""
    if value not in {"true", "false"}:
        message = f"must be true or false, not '{value}'"
        raise ValueError(message)
    return value == "true"
