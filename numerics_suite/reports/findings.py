"""A card as lines of a terminal: short, or with everything that was measured."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from numerics_suite.reports.charts import chart_lines
from numerics_suite.reports.lines import WIDTH, TerminalLine, printable, wrapped

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numerics_suite.reports.view.advice import Advised
    from numerics_suite.reports.view.cards import Card

INDENT = "  "
LABEL = 10
"""Columns of the label in front of each part of a block."""

CHARTED = {"loss": "losses", "gradient-norm": "gradient norms"}
"""Facts that a chart of the series tells."""


def block(card: Card, *, width: int = WIDTH, verbose: bool = False) -> list[TerminalLine]:
    """What failed on what, what happens and why, where, what shows it, what to do and how to see it again."""
    lines = wrapped(card.scope, width=width, first=f"FAIL  {card.check}   ", rest=" " * 6, style="bold red")
    lines += wrapped(card.sentence, width=width, first=INDENT, style="bold")
    lines += _labelled(card.lines, width)
    lines += _verbose(card, width) if verbose else []
    for at, cure in enumerate(card.cures, start=1):
        lines += _cure(cure, "fix" if at == 1 else "", f"{at}. " if len(card.cures) > 1 else "", width)
    if not card.cures:
        lines += _labelled([("fix", card.fixes[0])], width)
    if card.run_script:  # whole, to be copied
        first = f"{INDENT}{'script':<{LABEL}}"
        lines.append(TerminalLine(f"{first}{printable(card.run_script)}", "cyan", len(first)))
    return [*lines, *(_command_lines(card.words, width) if card.words else [])]


def _labelled(parts: Iterable[tuple[str, str]], width: int) -> list[TerminalLine]:
    """Each part behind its label, which is not said twice in a row."""
    lines, before = list[TerminalLine](), ""
    for label, text in parts:
        if text:
            first = f"{INDENT}{'' if label == before else label:<{LABEL}}"
            lines += wrapped(text, width=width, first=first, style="cyan")
            before = label
    return lines


def _cure(cure: Advised, label: str, number: str, width: int) -> list[TerminalLine]:
    """What to do, and what came of trying it: on the same line where there is room, else below."""
    first = f"{INDENT}{label:<{LABEL}}{number}"
    if len(first) + len(cure.text) <= width:
        return wrapped(cure.text, width=width, first=first, style="cyan")
    lines = wrapped(cure.action, width=width, first=first, style="cyan")
    return lines + (wrapped(cure.told, width=width, first=" " * len(first)) if cure.told else [])


def _verbose(card: Card, width: int) -> list[TerminalLine]:
    charted = {CHARTED[series.name] for series in card.series if series.name in CHARTED}
    known = {label for label, _ in card.lines}
    parts = [("measured", "" if "measured" in known else card.measured)]
    parts += [("evidence", f"{name}: {value}") for name, value in card.evidence if name not in charted]
    lines = _labelled(parts, width)
    lines += chart_lines(card.series, step=card.step, first=INDENT, column=LABEL, width=width)
    return lines + _labelled([("batch", card.batch), ("why", card.why)], width)


def _command_lines(words: Sequence[str], width: int) -> list[TerminalLine]:
    """The command over several lines with backslashes, so that it can be copied from any terminal."""
    first = f"{INDENT}{'run again':<{LABEL}}"
    pieces: list[str] = []
    for word in words:
        quoted = shlex.quote(printable(word))
        if not pieces or word.startswith("--"):
            pieces.append(quoted)
        else:
            pieces[-1] += f" {quoted}"
    rows: list[str] = []
    for piece in pieces:
        if rows and len(first) + len(rows[-1]) + len(piece) + 3 <= width:
            rows[-1] += f" {piece}"
        else:
            rows.append(piece)
    last = len(rows) - 1
    texts = [f"{row} \\" if index < last else row for index, row in enumerate(rows)]
    begin = " " * len(first)
    return [TerminalLine(f"{begin if index else first}{text}", "cyan", len(first)) for index, text in enumerate(texts)]
