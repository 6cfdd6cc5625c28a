"""A reporter: every check of every run as a row of a CSV file, for a spreadsheet or a dashboard."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from numerics_suite.extending import Documents, write_atomic

COLUMNS = ("run", "check", "subject", "task", "precision", "attn", "device", "status", "cause", "module", "title")


def write_table(documents: Documents, folder: Path) -> Sequence[Path]:
    """Write `checks.csv`: the runs that were given, then those within a matrix, oldest first."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for run in documents.every_run:
        for result in run.result.checks:
            cell, finding = result.cell, result.finding
            told = ("", "", "") if finding is None else (finding.cause, finding.module or "", finding.title)
            place = (cell.subject, cell.task, cell.precision, cell.attn, cell.device)
            table.writerow((run.label, result.check, *place, result.status, *told))
    path = folder / "checks.csv"
    write_atomic(path, text.getvalue())
    return [path]
