"""What a page shows against what a command printed: the same words, and numbers that differ no more than machines do."""

from __future__ import annotations

import math
import re

ELLIPSIS = "…"
"""A line of its own on a page: something was left out here."""

PROGRESS = re.compile(r"^\d+ of \d+ checks, .*$", re.MULTILINE)
VARYING = (
    (re.compile(r"\b(python|torch|transformers) \d[\w.+]*"), r"\1 VERSION"),
    (re.compile(r"\bnumerics-suite \d+\.\d+\.\d+\b"), "numerics-suite VERSION"),
    (re.compile(r"(?<![\w.])\d+(\.\d+)? (s|min|h)\b(?!\w)"), "DURATION"),
)
"""What no page can promise: versions, and how long something took."""

NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")
RELATIVE, NOISE = 0.1, 1e-9
"""Measured numbers may differ by a tenth, since another machine rounds otherwise; below the second they are noise."""


def difference(shown: str, printed: str) -> str | None:
    """What a page shows and the command did not print, None where both agree.

    White space does not count, since lines are wrapped at words whose lengths vary. Whole numbers must be the same.

    Args:
        shown: on the page.
        printed: by the command.
    """
    rest = _words(printed)
    parts = [_words(part) for part in re.split(rf"^\s*{ELLIPSIS}\s*$", shown, flags=re.MULTILINE)]
    at = 0
    for index, part in enumerate(parts):
        first, last = index == 0, index == len(parts) - 1
        starts = range(at, len(rest) - len(part) + 1)
        if first:
            starts = starts[:1]
        elif last:
            starts = starts[-1:]
        found = next((start for start in starts if _same(part, rest[start : start + len(part)])), None)
        if found is None or (last and found + len(part) != len(rest)):
            return " ".join(part[:60])
        at = found + len(part)
    return None


def _words(text: str) -> list[str]:
    text = PROGRESS.sub("", re.sub(r"\x1b\[[0-9;]*m", "", text))
    for pattern, word in VARYING:
        text = pattern.sub(word, text)
    return re.sub(r"-\s+", "-", text).split()


def _same(shown: list[str], printed: list[str]) -> bool:
    return len(shown) == len(printed) and all(map(_same_word, shown, printed))


def _same_word(shown: str, printed: str) -> bool:
    if shown == printed:
        return True
    if NUMBER.sub("0", shown) != NUMBER.sub("0", printed):
        return False
    return all(map(_same_number, NUMBER.findall(shown), NUMBER.findall(printed)))


def _same_number(shown: str, printed: str) -> bool:
    if re.fullmatch(r"[-+]?\d+", shown) and re.fullmatch(r"[-+]?\d+", printed):
        return shown == printed
    first, second = float(shown), float(printed)
    return math.isclose(first, second, rel_tol=RELATIVE, abs_tol=NOISE)
