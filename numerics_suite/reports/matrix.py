"""`matrix` for a person and as JSON: progress, one table of versions, and the verdict."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from numerics_suite.core.numbers import jsonable
from numerics_suite.core.text import listed
from numerics_suite.reports.lines import TerminalLine, cut, printable, wrapped
from numerics_suite.reports.terminal import Terminal
from numerics_suite.reports.view.formats import many
from numerics_suite.reports.view.places import version_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numerics_suite.core.versions import Change, MatrixCell, MatrixResult, Versions

MARKS = {"passed": "ok", "failed": "FAIL", "error": "ERR", "unsupported": "-"}
STYLES = {"passed": "green", "failed": "bold red", "error": "bold magenta", "unsupported": "dim"}
BASELINE = "baseline"

LONGEST_DETAIL = 80
"""Letters of a change's first detail that the table shows; the rest is in the JSON."""


class MatrixTerminal(Terminal):
    """Prints the cells as they end, and the table."""

    def __init__(
        self, *, stream: IO[str], quiet: bool = False, on_cells: Callable[[list[dict[str, Any]]], None] | None = None
    ) -> None:
        """As :class:`Terminal`; `on_cells` takes the entries of `cells` so far, before one is shown."""
        super().__init__(stream=stream, quiet=quiet)
        self._on_cells, self._cells = on_cells, list[dict[str, Any]]()
        self._noun = "environments"

    def doing(self, versions: Versions, what: str) -> None:
        """Say what takes long: an environment that is made."""
        if what not in {"environment", "running"}:
            self.notice(f"{versions.text}: {what}")

    def done(self, cell: MatrixCell, done: int, total: int) -> None:
        """One more cell has ended."""
        self._cells.append(cell_to_json(cell))
        if self._on_cells is not None:
            self._on_cells(list(self._cells))
        if cell.status in {"failed", "error"}:
            self._failed += 1
        if self._quiet:
            return
        if self._live:
            self._advance(done, total)
        how = "kept from an earlier run" if cell.reused else f"{cell.duration_s:.1f} s"
        checks = len({failure.check for failure in cell.failures})
        what = f"{many(checks, 'check')} did not pass" if checks else (cell.reason or "")
        text = f"{cell.held.text}: {cell.status} ({how}){f': {what}' if what else ''}"
        first = f"{MARKS[cell.status]:<5}"
        self._print(wrapped(text, width=self.width, first=first, style=STYLES[cell.status]))

    def table(self, result: MatrixResult) -> None:
        """The end of the run."""
        self.stop()
        if not self._quiet:
            self._print([TerminalLine(""), *table_lines(result, self.width), TerminalLine("")])
        self._print(verdict_lines(result, self.width))
        if self._error is not None and not isinstance(self._error, BrokenPipeError):
            raise self._error

    def planned(self, rows: Sequence[tuple[Versions, bool]]) -> None:
        """What `--list` shows.

        Args:
            rows: versions, and whether their cell is done already.
        """
        lines = [TerminalLine(f"{'transformers':<14}{'torch':<12}python", "bold")]
        for versions, done in rows:
            text = f"{versions.transformers or '?':<14}{versions.torch or '?':<12}{versions.python or '?':<8}"
            text += "".join(f"{name} {version}  " for name, version in versions.others)
            lines.append(TerminalLine(f"{text}{'done already' if done else ''}".rstrip()))
        done_already = sum(done for _, done in rows)
        self._print([*lines, TerminalLine(f"{len(rows)} environments, {done_already} done already; nothing was run")])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Neighbouring cells that say the same."""

    cells: tuple[MatrixCell, ...]

    @property
    def label(self) -> str:
        names = [cell.held.transformers or "?" for cell in self.cells]
        return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"


def table_lines(result: MatrixResult, width: int) -> list[TerminalLine]:
    """The table: version × subject × precision, runs of identical versions in one line."""
    parts: dict[str, list[MatrixCell]] = {}
    for cell in result.cells:
        held = cell.held
        others = "".join(f", {name} {version}" for name, version in held.others)
        parts.setdefault(f"torch {held.torch or '?'}, python {held.python or '?'}{others}", []).append(cell)
    lines: list[TerminalLine] = []
    for title, cells in parts.items():
        if lines:
            lines.append(TerminalLine(""))
        lines.append(TerminalLine(title, "bold"))
        groups = _groups(cells)
        column = max(12, *(len(group.label) for group in groups))
        subject = max([7, *(len(name) for cell in cells for name in _subjects(cell))])
        precision = max([9, *(len(row.precision) for cell in cells for row in cell.rows)])
        head = f"{'transformers':<{column}}  {'subject':<{subject}}  {'precision':<{precision}}"
        lines.append(TerminalLine(head, "bold"))
        for group in groups:
            lines += _group_lines(group, (column, subject, precision), width)
    return lines


def _groups(cells: Sequence[MatrixCell]) -> list[_Group]:
    groups: list[list[MatrixCell]] = []
    for cell in cells:
        same = groups and _state(groups[-1][-1]) == _state(cell) and not _since(cell)
        if same and cell.status != "error":
            groups[-1].append(cell)
        else:
            groups.append([cell])
    return [_Group(cells=tuple(group)) for group in groups]


def _state(cell: MatrixCell) -> object:
    """What must be alike for two cells to share a line; not what changed since the version before."""
    failing = tuple((failure.check, failure.subject, failure.precision, failure.attn) for failure in cell.failures)
    rows = tuple((row.subject, row.task, row.precision) for row in cell.rows)
    baseline = tuple(change for change in cell.changes if change.against == BASELINE)
    return cell.status, failing, rows, baseline, tuple(cell.unsupported)


def _since(cell: MatrixCell) -> tuple[Change, ...]:
    return tuple(change for change in cell.changes if change.against != BASELINE)


def _subjects(cell: MatrixCell) -> list[str]:
    return [*dict.fromkeys(row.subject for row in cell.rows), *cell.unsupported]


def _group_lines(group: _Group, columns: tuple[int, int, int], width: int) -> list[TerminalLine]:
    first = group.cells[0]
    lines: list[TerminalLine] = []
    label, (column, subject, precision) = group.label, columns
    for row in first.rows:
        if row.subject in first.unsupported:
            continue
        mark, text = _said(group, row.subject, row.task, row.precision)
        lead = f"{label:<{column}}  {row.subject:<{subject}}  {row.precision:<{precision}}  "
        lines += wrapped(f"{MARKS[mark]:<4} {text}", width=width, first=lead)
        label = ""
    for name, reason in first.unsupported.items():
        lines += wrapped(f"unsupported: {reason}", width=width, first=f"{label:<{column}}  {name:<{subject}}  ")
        label = ""
    if not first.rows and not first.unsupported:
        text = f"{MARKS[first.status]:<4} {first.reason or ''}"
        lines += wrapped(text, width=width, first=f"{label:<{column}}  ")
    elif first.reason and first.status == "error" and not first.failures:
        lines += wrapped(first.reason, width=width, first=f"{label:<{column}}  ")
    style = STYLES[first.status]
    return [
        TerminalLine(line.text, style, len(group.label)) if not at else TerminalLine(line.text)
        for at, line in enumerate(lines)
    ]


def _said(group: _Group, subject: str, task: str, precision: str) -> tuple[str, str]:
    """The mark of one row, and what failed and changed in it."""
    mark, failures, changes = group.cells[0].of(subject, task, precision)
    parts = [listed(list(dict.fromkeys(item.check for item in failures)), 4)] if failures else []
    parts += _changes_text(changes)
    if not changes and len(group.cells) > 1:
        parts.append("identical")
    elif any(item.against != BASELINE for item in changes) and len(group.cells) > 1:
        parts.append("identical since")
    return mark, "; ".join(parts)


def _changes_text(changes: Sequence[Change]) -> list[str]:
    """`5.7.0: changed (model.layers.0), rounding`, one for each other version."""
    by_other: dict[str, dict[str, str | None]] = {}
    for change in changes:
        by_other.setdefault(change.against, {}).setdefault(change.kind, change.module or _detail(change))
    return [
        f"against {other}: " + ", ".join(f"{kind} ({where})" if where else kind for kind, where in kinds.items())
        for other, kinds in by_other.items()
    ]


def _detail(change: Change) -> str | None:
    if not change.details:
        return None
    return cut(printable(change.details[0]), LONGEST_DETAIL)


def verdict_lines(result: MatrixResult, width: int) -> list[TerminalLine]:
    """How many of each status in what time, the notes, and the verdict last."""
    counted = {status: sum(cell.status == status for cell in result.cells) for status in MARKS}
    told = ", ".join(f"{number} {status}" for status, number in counted.items() if number)
    reused = sum(cell.reused for cell in result.cells)
    kept = f"; {reused} kept from an earlier run" if reused else ""
    lines = [line for note in result.notes for line in wrapped(note, width=width, first="note: ")]
    lines += wrapped(f"results: {result.folder}", width=width, rest="  ")
    lines.append(TerminalLine(f"{many(len(result.cells), 'environment')}: {told} in {result.duration_s:.1f} s{kept}"))
    status = result.exit_status
    word = {0: "PASS", 1: "FAIL", 3: "ERROR"}.get(status, "NOTHING RAN")
    style = {0: "bold green", 1: "bold red", 3: "bold magenta"}.get(status, "bold yellow")
    return [*lines, *wrapped(f"{word}{_about(result)} (exit {status})", width=width, rest="  ", style=style)]


def _about(result: MatrixResult) -> str:
    """Which environments the verdict is about: `: 1 of 2 environments failed: 4.57.6; 1 changed: 5.8.0`."""
    named = list(zip(version_labels(result.cells), result.cells, strict=True))
    kinds = [(word, [label for label, cell in named if cell.status == word]) for word in ("failed", "error")]
    kinds.append(("changed", [label for label, cell in named if cell.changes]))
    said = [(word, labels) for word, labels in kinds if labels]
    of_all = f" of {many(len(result.cells), 'environment')}"
    parts = [
        f"{len(labels)}{'' if at else of_all} {'could not be checked' if word == 'error' else word}: {listed(labels, 6)}"
        for at, (word, labels) in enumerate(said)
    ]
    return f": {'; '.join(parts)}" if parts else ""


def matrix_to_json(result: MatrixResult) -> dict[str, Any]:
    """The file of `matrix`."""
    return {
        "schema_version": 1,
        "command": "matrix",
        "duration_s": result.duration_s,
        "exit_status": result.exit_status,
        "notes": list(result.notes),
        "cells": [cell_to_json(cell) for cell in result.cells],
    }


KEPT = "matrix.json"
"""The file of `matrix` in the folder of its cells: from it a report of the whole folder is made."""


def kept_json(result: MatrixResult) -> dict[str, Any]:
    """The file of `matrix` with paths from its own folder, so that the folder may be moved."""
    cells = tuple(
        replace(cell, results=_within(cell.results, result.folder), baseline=_within(cell.baseline, result.folder))
        for cell in result.cells
    )
    return matrix_to_json(replace(result, cells=cells))


def _within(path: Path | None, folder: Path) -> Path | None:
    return path.relative_to(folder) if path is not None and path.is_relative_to(folder) else path


def cell_to_json(cell: MatrixCell) -> dict[str, Any]:
    """One entry of `cells`."""
    content: dict[str, Any] = jsonable(asdict(cell))
    left_out = ("wanted", "held", "bad_input")
    return _versions_json(cell.held) | {name: value for name, value in content.items() if name not in left_out}


def _versions_json(versions: Versions) -> dict[str, Any]:
    return {
        "transformers": versions.transformers,
        "torch": versions.torch,
        "python": versions.python,
        "with": dict(versions.others),
    }


def planned_to_json(rows: Sequence[tuple[Versions, bool]]) -> dict[str, Any]:
    """The answer of `matrix --list --json`: each row's versions, and whether its cell is done already."""
    planned = [{**_versions_json(versions), "done": done} for versions, done in rows]
    return {"schema_version": 1, "command": "matrix", "planned": planned}
