"""What `--list` shows: the planned cells with the memory that each may need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numerics_suite.reports.lines import TerminalLine
from numerics_suite.reports.view.formats import many

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numerics_suite.core.records import Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One planned cell.

    Attributes:
        bytes: memory that it may need at its largest, None where that is unknown.
        seconds: that its checks are expected to take, None where that is unknown.
        note: why nothing of it will run, or another word about it.
    """

    cell: Cell
    checks: int
    bytes: int | None
    seconds: float | None = None
    note: str = ""


def readable_bytes(count: int | None) -> str:
    """`12 MB`, `1.4 GB` in powers of ten, `?` for an unknown number."""
    if count is None:
        return "?"
    size, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size < 999.5 or unit == "TB":
            break
        size /= 1000
    return f"{size:.1f} {unit}" if size < 9.95 and unit != "B" else f"{size:.0f} {unit}"


def readable_seconds(seconds: float | None) -> str:
    """`40 s`, `6 min`, `2.5 h`, `?` for an unknown number; an estimate has no more digits than it is worth."""
    if seconds is None:
        return "?"
    if seconds < 1:
        return "<1 s"
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        count = seconds / size
        if count < 99.5 or unit == "h":
            break
    return f"{count:.0f} {unit}" if count >= 9.5 or unit == "s" else f"{count:.1f} {unit}"


def about_seconds(seconds: float) -> str:
    """`about 6 min`, `less than 1 s`."""
    return "less than 1 s" if seconds < 1 else f"about {readable_seconds(seconds)}"


def plan_lines(rows: Sequence[PlanRow], seconds: float | None = None) -> list[TerminalLine]:
    """The table."""
    width = max([len("subject"), *(len(row.cell.subject) for row in rows)])
    lines = [
        TerminalLine(
            f"{'subject':<{width}}  {'precision':<9}  {'attention':<9}  {'device':<6}  checks   memory     time", "bold"
        )
    ]
    for row in rows:
        cell = row.cell
        note = f"  {row.note}" if row.note else ""
        lines.append(
            TerminalLine(
                f"{cell.subject:<{width}}  {cell.precision:<9}  {cell.attn:<9}  {cell.device:<6}  {row.checks:>6}"
                f"  {readable_bytes(row.bytes):>7}  {readable_seconds(row.seconds):>7}{note}",
                "" if row.checks else "dim",
            )
        )
    known = [row.bytes for row in rows if row.bytes is not None]
    largest = f"; the largest cell may need {readable_bytes(max(known))}" if known else ""
    whole = "" if seconds is None else f"; {about_seconds(seconds)} on an idle machine"
    lines.append(
        TerminalLine(
            f"{many(len(rows), 'cell')}, {many(sum(row.checks for row in rows), 'check')}{largest}{whole}; nothing was run"
        )
    )
    return lines


def plan_to_json(rows: Sequence[PlanRow]) -> dict[str, Any]:
    """The answer of `check --list --json`."""
    return {
        "schema_version": 1,
        "command": "check",
        "planned": [
            {
                **row.cell.named,
                "checks": row.checks,
                "bytes": row.bytes,
                "seconds": None if row.seconds is None else round(row.seconds, 1),
                "note": row.note,
            }
            for row in rows
        ],
    }
