"""Lines of text with a style each, wrapped to a width; the terminal colours them, everything else takes the text."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from numerics_suite.core.text import harmless

WIDTH = 80

NARROWEST = 20
"""Columns that a label leaves for its text at least; behind a longer one the lines that follow begin near the margin."""

LONGEST = 4_000
"""Letters of one text that are shown; whoever wrote a results file decides how long its texts are."""

SIMPLER = str.maketrans(
    {
        **dict(zip("▁▂▃▄▅▆▇█░×", "_.,-=+*#.x", strict=True)),
        "→": "->",
        "↔": "<->",
        "…": "...",
        "–": "-",
    }
)
"""ASCII for the letters that charts and blocks are made of."""


@dataclass(frozen=True, slots=True)
class TerminalLine:
    """One line.

    Attributes:
        text: printable, without a newline.
        style: a style of rich, empty for none; of the first `styled` characters where that is given.
        styled: how much of the text has the style, None for all of it.
    """

    text: str
    style: str = ""
    styled: int | None = None


def printable(text: str) -> str:
    """The text in one line, with control characters, which could steer a terminal, shown as `?`."""
    joined = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in joined)


def shortened(text: str, most: int) -> str:
    """The text, or as much of it as there is room for, with how much is missing.

    Args:
        text: one line.
        most: letters.
    """
    return text if len(text) <= most else f"{text[:most].rstrip()}… ({len(text) - most:,} letters more)"


def cut(text: str, most: int) -> str:
    """The text in at most that many letters, the last of them an ellipsis where there were more."""
    return text if len(text) <= most else f"{text[: most - 1].rstrip()}…"


def sayable(text: str, stream: object) -> str:
    """The text as :func:`harmless`, in letters that the stream can say: charts and arrows in ASCII where it has no others.

    Args:
        text: one line.
        stream: its `encoding` decides; a stream without one takes everything.
    """
    text = harmless(text)
    try:
        text.encode(str(getattr(stream, "encoding", None) or "utf-8"))
    except UnicodeEncodeError:
        return text.translate(SIMPLER)
    except LookupError:
        pass
    return text


def wrapped(text: str, *, width: int, first: str = "", rest: str | None = None, style: str = "") -> list[TerminalLine]:
    """The text in lines of at most `width` columns; a longer word, such as a path, stays whole.

    Args:
        text: any length.
        width: in columns.
        first: what the first line begins with; the style, if any, is the label's.
        rest: what the others begin with, None for as many spaces.
        style: of `first`, or of everything where there is no `first`.
    """
    begin = " " * (len(first) if len(first) <= width - NARROWEST else 4) if rest is None else rest
    parts = textwrap.wrap(
        shortened(printable(text), LONGEST),
        width=width,
        initial_indent=first,
        subsequent_indent=begin,
        break_long_words=False,
        break_on_hyphens=False,
    ) or [first.rstrip()]
    labelled = len(first) if first else None
    return [
        TerminalLine(parts[0], style, labelled),
        *(TerminalLine(part, "" if labelled else style) for part in parts[1:]),
    ]
