"""The end of a run: one line per check, the findings, what was skipped and why, and the verdict."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from numerics_suite.core.text import listed
from numerics_suite.judgement.budgets import budgets_of
from numerics_suite.reports.findings import block, cells_text, grouped
from numerics_suite.reports.lines import WIDTH, TerminalLine, wrapped
from numerics_suite.reports.numbers import shown
from numerics_suite.reports.results import counts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numerics_suite.core.records import CheckResult, RunResult

LABELS = {"failed": "FAIL", "error": "ERR", "accepted": "acc", "passed": "ok", "skipped": "skip"}
"""Worst first; a check's label is its worst result's."""

STYLES = {"failed": "bold red", "error": "bold magenta", "accepted": "yellow", "passed": "green", "skipped": "dim"}
RANK = {status: index for index, status in enumerate(LABELS)}

NOTHING_RAN = 5
"""The exit status for which no check ran, or not all that were asked for."""

INFORMS = {"forward.headroom": ("bits", min)}
"""Checks whose telling number has no budget: its name, and which of several is the worst."""


def summary(run: RunResult, *, width: int = WIDTH, quiet: bool = False) -> list[TerminalLine]:
    """All lines of the end of a run.

    Args:
        run: the whole run.
        width: in columns.
        quiet: the titles of the findings and the verdict alone.
    """
    groups = grouped(result for result in run.checks if result.status == "failed")
    if quiet:
        lines = []
        for group in groups:
            text = f"{group.worst.check} {group.worst.cell.subject}: {group.finding.title}"
            lines += wrapped(text, width=width, rest="  ", style="bold red")
        return [*lines, *_notes(run, width), *verdict_lines(run)]
    lines = _table(run.checks, width)
    for number, group in enumerate(groups, start=1):
        lines += [TerminalLine(""), *block(group, number=number, run=run, width=width)]
    for section in (
        _errors(run, width),
        _accepted(run, width),
        _skipped(run, width),
        _notes(run, width, told_before="--data: "),
    ):
        if section:
            lines += [TerminalLine(""), *section]
    return [*lines, TerminalLine(""), *verdict_lines(run)]


def verdict_lines(run: RunResult) -> list[TerminalLine]:
    """How many of each status in what time, and last of all the verdict: `FAIL: 3 findings (exit 1)`."""
    counted = counts(run.checks)
    parts = [
        _many(number, status) if status == "error" else f"{number:,} {status}"
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
    groups = grouped(result for result in run.checks if result.status == "failed")
    found = f": {_many(len(groups), 'finding')}" if groups else ""
    told = ", ".join(parts) or "no check was planned"
    return [
        TerminalLine(f"{told} in {run.duration_s:.1f} s"),
        TerminalLine(f"{word}{found} (exit {run.exit_status})", style),
    ]


def _many(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _table(checks: Sequence[CheckResult], width: int) -> list[TerminalLine]:
    by_check: dict[str, list[CheckResult]] = {}
    for result in checks:
        by_check.setdefault(result.check, []).append(result)
    if not by_check:
        return []
    column = max(len(check) for check in by_check)
    lines = [TerminalLine(f"{'':<5}{'check':<{column}}  {'ran':>5}  worst", "bold")]
    for check, results in by_check.items():
        lines.append(_row(check, results, column, width))
    return lines


def _row(check: str, results: list[CheckResult], column: int, width: int) -> TerminalLine:
    status = min((result.status for result in results), key=RANK.__getitem__)
    ran = [result for result in results if result.status not in {"skipped", "error"}]
    lead = f"{LABELS[status]:<5}{check:<{column}}  {len(ran):>5}  "
    value, where = worst_of(check, results)
    gap = "  " if value and where else ""
    room = width - len(lead) - len(value) - len(gap)
    return TerminalLine(f"{lead}{value}{gap}{_fitted(where, room)}".rstrip(), STYLES[status], 4)


def _fitted(where: str, room: int) -> str:
    """The cell in so many columns: its subject is cut, for precision and attention tell more."""
    if len(where) <= room:
        return where
    subject, slash, rest = where.partition("/")
    kept = max(room - len(slash) - len(rest) - 3, 1)
    return f"{subject[:kept]}...{slash}{rest}"


def worst_of(check: str, results: Sequence[CheckResult]) -> tuple[str, str]:
    """The worst value that a check measured and the cell where that was; no cell where all are alike.

    Args:
        check: its id.
        results: of all cells, at least one.
    """
    status = min((result.status for result in results), key=RANK.__getitem__)
    if status == "skipped":
        return "", ""
    if status == "error":
        first = next(result for result in results if result.status == "error")
        return "", _cell(first)
    if status == "passed" and check in INFORMS:
        name, extreme = INFORMS[check]
        told = [(result.measurements[name], result) for result in results if name in result.measurements]
        if told:
            least, where = extreme(told, key=lambda pair: _first_nan(pair[0], extreme))
            return f"{name} {shown(least)}", _cell(where)
    found = [(*_worst(result), result) for result in results if result.status == status]
    excess, nearest, result = max(found, key=lambda entry: entry[0])
    if nearest is None:
        return "", (_cell(result) if status != "passed" else "")
    everywhere = status == "passed" and all(entry[0] == excess for entry in found)
    value = f"{nearest} {shown(result.measurements[nearest])}"
    return value, ("" if everywhere else _cell(result))


def _first_nan(value: float, extreme: Callable[..., object]) -> float:
    """NaN ordered as the worst there is."""
    if not math.isnan(value):
        return value
    return -math.inf if extreme is min else math.inf


def _cell(result: CheckResult) -> str:
    """The cell in its table row; the device is the same for all and stands in the header."""
    return f"{result.cell.subject}/{result.cell.precision}/{result.cell.attn}"


def _worst(result: CheckResult) -> tuple[float, str | None]:
    """How near its budget the measurement is that is nearest, and its name; a check without budgets has none."""
    budgets = budgets_of(result.check)
    rated = [
        (_excess(value, budgets[name].limit), name) for name, value in result.measurements.items() if name in budgets
    ]
    return max(rated, default=(0.0, None), key=lambda pair: pair[0])


def _excess(value: float, limit: float) -> float:
    if math.isnan(value):
        return math.inf
    if limit == 0:
        return value * 1e300 if value > 0 else value
    return value / limit


def _errors(run: RunResult, width: int) -> list[TerminalLine]:
    by_reason: dict[str, list[CheckResult]] = {}
    for result in run.checks:
        if result.status == "error":
            by_reason.setdefault(result.reason or "no reason given", []).append(result)
    lines = [TerminalLine("could not be carried out", STYLES["error"])] if by_reason else []
    for reason, results in by_reason.items():
        lines += wrapped(f"{reason} -- {_asked(results)}", width=width, first="   ")
    return lines


def _accepted(run: RunResult, width: int) -> list[TerminalLine]:
    groups = grouped(result for result in run.checks if result.status == "accepted")
    lines = [TerminalLine("accepted", STYLES["accepted"])] if groups else []
    for group in groups:
        cells = cells_text([member.cell for member in group.results])
        text = f"{group.worst.check} on {group.worst.cell.subject}: {group.finding.title} ({group.finding.cause})"
        lines += wrapped(text, width=width, first="   ", rest=" " * 5)
        lines += wrapped(f"reason: {group.worst.reason} -- {cells}", width=width, first=" " * 5)
    return lines


def _skipped(run: RunResult, width: int) -> list[TerminalLine]:
    by_reason: dict[str, list[CheckResult]] = {}
    for result in run.checks:
        if result.status == "skipped":
            by_reason.setdefault(result.reason or "no reason given", []).append(result)
    lines = [TerminalLine("skipped", STYLES["skipped"])] if by_reason else []
    for reason, results in by_reason.items():
        lines += wrapped(f"{reason} -- {_asked(results)}", width=width, first=f"{len(results):>5}  ")
    return lines


def _asked(results: Sequence[CheckResult]) -> str:
    """Which checks on which subjects, short; a group of checks where there are many."""
    checks = sorted({result.check for result in results})
    if len(checks) > 3:
        checks = sorted({f"{check.partition('.')[0]}.*" for check in checks})
    subjects = sorted({result.cell.subject for result in results})
    precisions = sorted({result.cell.precision for result in results})
    return f"{', '.join(checks)} on {listed(subjects, 3)} in {listed(precisions, 4)}"


def _notes(run: RunResult, width: int, told_before: str | None = None) -> list[TerminalLine]:
    """What a person should know; not what the head of the run has said already."""
    notes = [note for note in run.notes if told_before is None or not note.startswith(told_before)]
    return [line for note in notes for line in wrapped(note, width=width, first="note: ", style="bold yellow")]
