"""How the report writes numbers, names and statuses: what its templates call."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any, Final

from numerics_suite.core.numbers import jsonable, name_of
from numerics_suite.reports.numbers import shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SIGNS: Final = {"passed": "✓", "failed": "×", "accepted": "≈", "skipped": "–", "error": "!", "unsupported": "–"}
"""A status has a sign and a word; colour only repeats them."""

STATUSES: Final = ("failed", "error", "accepted", "passed", "skipped")
"""Worst first."""

NOTHING_RAN: Final = 5
"""The exit status for which no check ran, or not all that were asked for."""

DIGITS: Final = 5
"""Significant digits in tables from which plots are drawn."""

_UNFIT = re.compile(r"[^a-z0-9]+")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that no font shows, that turn the direction of the text around them, or that no file can hold."""


def plain(value: Any) -> str:
    """The text without characters that would hide or reorder what is around them, each shown as `?`."""
    return _CONTROL.sub("?", str(value))


def number(value: Any) -> str:
    """A number for a person, in four digits; a text as it is."""
    return plain(shown(value))


def exact(value: float) -> str:
    """A number that a program reads too: no separators, `NaN` and `Infinity` as they are."""
    if not math.isfinite(value):
        return name_of(value)
    return f"{value:.{DIGITS}g}"


def many(count: int, noun: str) -> str:
    """`1 finding`, `12 findings`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def plural(nouns: str, count: float) -> str:
    """A unit in the plural, such as `batches`, as it is for that count."""
    if count != 1:
        return nouns
    return nouns.removesuffix("es") if nouns.endswith(("ches", "sses")) else nouns.removesuffix("s")


def seconds(value: float) -> str:
    """A duration as a person says it."""
    if not math.isfinite(value):
        return name_of(value)
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def sentence(text: str) -> str:
    """The text with a capital letter, where its first word is a word and no name of a module."""
    first = text.split(" ", 1)[0].rstrip(":,")
    return text[:1].upper() + text[1:] if first.isalpha() and first.islower() else text


def slug(text: str) -> str:
    """The text as part of an anchor: letters, digits and hyphens; not unique by itself."""
    return _UNFIT.sub("-", text.lower()).strip("-")[:60] or "x"


def as_json(value: Any) -> str:
    """JSON for an attribute or a script element: the template escapes what HTML would read."""
    return json.dumps(jsonable(value), allow_nan=False, separators=(",", ":"))


def worst_status(statuses: Iterable[str]) -> str:
    """The worst of some statuses, at least one."""
    return min(statuses, key=STATUSES.index)


def sign(status: str) -> str:
    """The sign of a status."""
    return SIGNS.get(status, "?")


FILTERS: Final[dict[str, Callable[..., str]]] = {
    "plain": plain,
    "number": number,
    "exact": exact,
    "seconds": seconds,
    "sentence": sentence,
    "slug": slug,
    "sign": sign,
    "as_json": as_json,
}
