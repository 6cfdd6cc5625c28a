"""Any text as GitHub's and GitLab's Markdown shows it: nothing in it is markup, a mention, a reference or a cell's end."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from numerics_suite.reports.lines import printable

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "$": "&#36;"}
"""Characters that a backslash does not disarm everywhere: a `|` ends a table's cell, a `$` begins mathematics."""

_ACTIVE = re.compile(r"(?P<reference>(?<!\w)[@#!%](?=\w))|[&<>|$]|[\\`*\[\]~]|(?<![^\W_])_|_(?![^\W_])")
"""What Markdown acts on. `@name` mentions somebody, `#1`, `!1` and `%1` refer to issues, requests and milestones, also
behind a backslash."""

_LEAD = re.compile(r"^(?:([0-9]{1,9})([.)])(?=\s|$)|([-+](?=[\s-]|$)|[=#]))")
"""What makes a list, a heading or a line out of the text behind it."""

_UNFIT_FOR_TICKS = re.compile(r"[`|\\]")
_FOLDERS = re.compile(r"(?<![\w/:.~…-])(?:file:/{2}|[A-Za-z]:)?[/\\](?:[^\s/\\'\"`,;:()<>|*?]+[/\\])+")


def text(value: object) -> str:
    """One line of running text, also within a table's cell."""
    line = _ACTIVE.sub(_disarmed, printable(str(value)))
    return _LEAD.sub(lambda found: f"{found[1]}\\{found[2]}" if found[1] else f"\\{found[3]}", line)


def _disarmed(found: re.Match[str]) -> str:
    sign = found[0]
    if found["reference"]:
        return f"{sign}&#8203;"  # a space of no width: the text looks the same, and no name follows the sign
    return _ENTITIES.get(sign, f"\\{sign}")


def code(value: object) -> str:
    """A name or a short command as code, also within a table's cell; nothing for an empty text."""
    line = printable(str(value))
    if not line:
        return ""
    if not _UNFIT_FOR_TICKS.search(line):
        return f"`{line}`"
    # Between ticks nothing can be disarmed, so these are HTML, every sign of theirs a number.
    signs = (
        letter if letter.isalnum() or letter in " .,/-" or not letter.isascii() else f"&#{ord(letter)};"
        for letter in line
    )
    return f"<code>{''.join(signs)}</code>"


def fenced(value: str, language: str = "") -> str:
    """Lines as they are, to be copied.

    Args:
        value: any text; its line ends are kept.
        language: for colours.
    """
    lines = [printable_line(line) for line in value.splitlines()]
    longest = max((len(run) for run in re.findall(r"`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return "\n".join([f"{fence}{language}", *lines, fence])


def printable_line(line: str) -> str:
    """A line with its blanks, and control characters shown as `?`."""
    return "".join(letter if letter.isprintable() else "?" for letter in line.expandtabs(4))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; nothing where there is no row."""
    told = [list(row) for row in rows]
    if not told:
        return ""
    lines = [heads, ["---"] * len(heads), *told]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def folded(title: str, body: str) -> str:
    """Something that opens at a click; nothing where there is no body."""
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>" if body else ""


def without_folders(value: object) -> str:
    """The text with the last part alone of every path from a root: so a report names no user's folders, and is the same on two machines."""
    return _FOLDERS.sub("…/", str(value))


def joined(blocks: Iterable[str], most: int, rest: Callable[[int], str], size: Callable[[str], int] = len) -> str:
    """As many whole blocks as there is room for, with an empty line between, and a note on those left out.

    Args:
        blocks: as Markdown, what matters most first; empty ones are passed over.
        most: size at most.
        rest: from the number of blocks left out to the note.
        size: of a text.
    """
    told = [block for block in blocks if block]
    kept: list[str] = []
    room = most - size(rest(len(told))) - 3
    for at, block in enumerate(told):
        room -= size(block) + 2
        if room < 0:
            kept.append(rest(len(told) - at))
            break
        kept.append(block)
    return "\n\n".join(kept) + "\n"
