"""The end of a run: one line per check, the findings, what was skipped and why, and the verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numerics_suite.core.text import listed
from numerics_suite.reports.documents import CheckRun, Documents
from numerics_suite.reports.findings import block
from numerics_suite.reports.lines import WIDTH, TerminalLine, printable, wrapped
from numerics_suite.reports.results import counts
from numerics_suite.reports.view.cards import Card, cards_of
from numerics_suite.reports.view.formats import NOTHING_RAN, many, worst_status
from numerics_suite.reports.view.measured import worst_of
from numerics_suite.reports.view.places import CheckCell, Places, places_of
from numerics_suite.reports.view.problems import problems_of
from numerics_suite.reports.view.sections import reasons_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numerics_suite.core.records import RunResult

LABELS = {"failed": "FAIL", "error": "ERR", "accepted": "acc", "passed": "ok", "skipped": "skip"}
STYLES = {"failed": "bold red", "error": "bold magenta", "accepted": "yellow", "passed": "green", "skipped": "dim"}


def summary(run: RunResult, *, width: int = WIDTH, quiet: bool = False, verbose: bool = False) -> list[TerminalLine]:
    """All lines of the end of a run."""
    places = places_of(Documents(runs=(CheckRun(label="", result=run),)))
    cards = cards_of(problems_of(places))
    failed = [card for card in cards if card.status == "failed"]
    if quiet:
        lines = []
        for card in failed:
            text = f"{card.check} {listed(card.subjects, 2)}: {card.sentence}"
            lines += wrapped(text, width=width, rest="  ", style="bold red")
        return [*lines, *_notes(run, width), *verdict_lines(run, failed)]
    lines = _table(places, width)
    for card in failed:
        lines += [TerminalLine(""), *block(card, width=width, verbose=verbose)]
    for section in (
        _reasons(places, "error", "could not be carried out", width),
        _accepted(cards, width),
        _reasons(places, "skipped", "skipped", width),
        _notes(run, width, told_before="--data: "),
    ):
        if section:
            lines += [TerminalLine(""), *section]
    return [*lines, TerminalLine(""), *verdict_lines(run, failed)]


def verdict_lines(run: RunResult, failed: Sequence[Card]) -> list[TerminalLine]:
    """How many of each status in what time, and last of all the verdict: `FAIL: 2 findings in glm4-tiny (exit 1)`."""
    counted = counts(run.checks)
    parts = [
        many(number, status) if status == "error" else f"{number:,} {status}"
        for status, number in counted.items()
        if number
    ]
    word = {"pass": "PASS", "fail": "FAIL", "error": "ERROR"}[run.verdict]
    style = {"pass": "bold green", "fail": "bold red", "error": "bold magenta"}[run.verdict]
    if run.exit_status == NOTHING_RAN:
        word = "INCOMPLETE" if counted["passed"] + counted["accepted"] else "NOTHING RAN"
        style = "bold yellow"
    if not run.complete:
        word, style = "INTERRUPTED", "bold yellow"
    subjects = printable(listed(list(dict.fromkeys(name for card in failed for name in card.subjects)), 4))
    about = f": {many(len(failed), 'finding')} in {subjects}" if failed else ""
    told = ", ".join(parts) or "no check was planned"
    return [
        TerminalLine(f"{told} in {run.duration_s:.1f} s"),
        TerminalLine(f"{word}{about} (exit {run.exit_status})", style),
    ]


def _table(places: Places, width: int) -> list[TerminalLine]:
    by_check: dict[str, list[CheckCell]] = {}
    for place in places.all:
        by_check.setdefault(place.result.check, []).append(place)
    if not by_check:
        return []
    column = max(len(check) for check in by_check)
    lines = [TerminalLine(f"{'':<5}{'check':<{column}}  {'ran':>5}  worst", "bold")]
    return lines + [_row(check, members, column, width) for check, members in by_check.items()]


def _row(check: str, members: Sequence[CheckCell], column: int, width: int) -> TerminalLine:
    status = worst_status(place.result.status for place in members)
    ran = sum(place.result.status not in {"skipped", "error"} for place in members)
    lead = f"{LABELS[status]:<5}{check:<{column}}  {ran:>5}  "
    worst, where = worst_of(members)
    value = "" if worst is None else worst.text
    gap = "  " if value and where else ""
    room = width - len(lead) - len(value) - len(gap)
    return TerminalLine(f"{lead}{value}{gap}{_cell(where, room)}".rstrip(), STYLES[status], 4)


def _cell(place: CheckCell | None, room: int) -> str:
    """The cell in that many columns: its subject is cut first, since precision and attention matter more; the device is in the header."""
    if place is None:
        return ""
    cell = place.result.cell
    rest = f"/{cell.precision}/{cell.attn}"
    if len(cell.subject) + len(rest) <= room:
        return cell.subject + rest
    return f"{cell.subject[: max(room - len(rest) - 3, 1)]}...{rest}"


def _reasons(places: Places, status: str, title: str, width: int) -> list[TerminalLine]:
    found = reasons_of(places, status)
    lines = [TerminalLine(title, STYLES[status])] if found else []
    for one in found:
        text = f"{one.reason} -- {one.checks} on {one.where}"
        lines += wrapped(text, width=width, first=f"{one.count:>5}  ")
    return lines


def _accepted(cards: Sequence[Card], width: int) -> list[TerminalLine]:
    lines = []
    for card in cards:
        if card.status == "accepted":
            lines += wrapped(f"{card.check}   {card.scope}", width=width, first="   ", rest=" " * 5)
            lines += wrapped(card.sentence, width=width, first=" " * 5)
            lines += wrapped(f"reason: {card.reason}", width=width, first=" " * 5)
    return [TerminalLine("accepted", STYLES["accepted"]), *lines] if lines else []


def _notes(run: RunResult, width: int, told_before: str | None = None) -> list[TerminalLine]:
    """What a person should know; not what the head of the run has said already."""
    notes = [note for note in run.notes if told_before is None or not note.startswith(told_before)]
    return [line for note in notes for line in wrapped(note, width=width, first="note: ", style="bold yellow")]
