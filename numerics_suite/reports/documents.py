"""The files that `check`, `matrix`, `compare` and `bisect` write, read back: what every report is made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.findings import finding_from_json
from numerics_suite.core.json_text import read_json_text
from numerics_suite.core.numbers import revived
from numerics_suite.core.typed_records import record_of, refuse_other_shape
from numerics_suite.core.versions import MatrixCell, MatrixResult
from numerics_suite.judgement.classify import KINDS
from numerics_suite.reports.results import from_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numerics_suite.core.records import Finding, RunResult


NUMBER = (int, float)
TEXT_OR_NONE = (str, type(None))
COMPARISON = {
    "old": str,
    "new": str,
    "subjects!": [
        {
            "subject!": str,
            "task": TEXT_OR_NONE,
            "precision!": str,
            "attn": TEXT_OR_NONE,
            "device": TEXT_OR_NONE,
            "kind!": str,
            "module": TEXT_OR_NONE,
            "error_ratio": (int, float, type(None)),
            "details": {
                "error_before": NUMBER,
                "error_now": NUMBER,
                "headroom_change": NUMBER,
                "local_errors": [{"module!": str, "before!": NUMBER, "now!": NUMBER}],
                **{name: [str] for name in ("why", "bits_differ", "environment", "all_kinds", "contract", "missing")},
            },
        }
    ],
}
"""What the printers read of a comparison."""

MATRIX = {"cells!": [{"with": dict}]}
"""What is read of a matrix before its cells are records."""

BISECTION = {
    **{f"{name}!": TEXT_OR_NONE for name in ("first_bad", "last_good")},
    **dict.fromkeys(("what", "subject", "check", "kind", "show"), TEXT_OR_NONE),
    "candidates": int,
    "between": [str],
    "notes": [str],
    "tested!": [{"version!": str, "verdict!": str, "duration_s!": NUMBER, "reason": TEXT_OR_NONE, "reused": bool}],
}
"""What the printers read of a search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRun:
    """One run of `check`.

    Attributes:
        label: tells it from the others of a report: the versions of a matrix's cell, else the file's name.
        result: all of it.
        path: of the file, None for a run that was never written.
    """

    label: str
    result: RunResult
    path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """One `matrix`.

    Attributes:
        result: its cells, oldest first.
        runs: what `check` said in each cell, None where the cell has no results file or that file is gone.
        path: of the file, None for one that was never written.
    """

    result: MatrixResult
    runs: tuple[CheckRun | None, ...]
    path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonFile:
    """One `compare`: its content as CONTRACT.md has it, with numbers that are not finite as numbers."""

    content: Mapping[str, Any]
    path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BisectFile:
    """One `bisect`: its content as CONTRACT.md has it, and the finding at the first bad version."""

    content: Mapping[str, Any]
    finding: Finding | None
    path: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Documents:
    """Everything that one report covers.

    Attributes:
        notes: lines that a person should see, such as a cell whose results file is gone.
    """

    runs: tuple[CheckRun, ...] = ()
    matrices: tuple[Matrix, ...] = ()
    comparisons: tuple[ComparisonFile, ...] = ()
    bisections: tuple[BisectFile, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def every_run(self) -> tuple[CheckRun, ...]:
        """The runs, then those of the matrices, oldest first."""
        inside = (run for matrix in self.matrices for run in matrix.runs if run is not None)
        return (*self.runs, *inside)

    @property
    def every_note(self) -> tuple[str, ...]:
        """What a person should see: notes of the report, of its matrices and of every run, each once."""
        notes = [*self.notes, *(note for matrix in self.matrices for note in matrix.result.notes)]
        return tuple(dict.fromkeys([*notes, *(note for run in self.every_run for note in run.result.notes)]))


def read_documents(paths: Sequence[Path]) -> Documents:
    """Read result files of any command.

    Raises:
        BadInputError: one cannot be read, or is no results file; the message names it.
    """
    runs: list[CheckRun] = []
    matrices: list[Matrix] = []
    comparisons: list[ComparisonFile] = []
    bisections: list[BisectFile] = []
    notes: list[str] = []
    for path in paths:
        content = read_document(path)
        command = content.get("command")
        try:
            if command == "matrix":
                matrices.append(_matrix(content, path, notes))
            elif command == "compare":
                comparisons.append(ComparisonFile(content=_comparison(content), path=path))
            elif command == "bisect":
                refuse_other_shape(revived(content), BISECTION, "")
                finding = content.get("finding")
                found = None if finding is None else finding_from_json(finding, "finding.")
                bisections.append(BisectFile(content=revived(content), finding=found, path=path))
            else:
                runs.append(CheckRun(label=path.stem, result=from_json(content), path=path))
        except (TypeError, ValueError) as error:
            message = f"{path}: not a results file of this tool: {error}"
            raise BadInputError(message) from None
        except BadInputError as error:
            message = f"{path}: {error}"
            raise BadInputError(message) from None
    return Documents(
        runs=tuple(runs),
        matrices=tuple(matrices),
        comparisons=tuple(comparisons),
        bisections=tuple(bisections),
        notes=tuple(notes),
    )


def read_document(path: Path) -> dict[str, Any]:
    """The content of a file that `--json` wrote, as it stands there.

    Raises:
        BadInputError: it cannot be read, or holds no JSON object; the message names it.
    """
    try:
        content = read_json_text(path)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror or error}"
        raise BadInputError(message) from None
    except ValueError as error:
        message = f"{path}: not JSON ({error}); give a file that --json wrote"
        raise BadInputError(message) from None
    if not isinstance(content, dict):
        message = f"{path}: not a results file of this tool; give a file that --json wrote"
        raise BadInputError(message)
    return content


def read_check(path: Path, option: str) -> tuple[dict[str, Any], RunResult]:
    """A results file of `check`, as it stands there and as a record.

    Raises:
        BadInputError: it cannot be read, or is no such file; the message names it.
    """
    content = read_document(path)
    if content.get("command") != "check":
        message = f"{option} {path}: not a results file of check"
        raise BadInputError(message)
    try:
        return content, from_json(content)
    except BadInputError as error:
        message = f"{option} {path}: {error}"
        raise BadInputError(message) from None


def _comparison(content: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = revived(content)
    refuse_other_shape(found, COMPARISON, "")
    for item in found["subjects"]:
        if item["kind"] not in KINDS:
            message = f"a kind must be one of {', '.join(KINDS)}, not {item['kind'][:40]!r}"
            raise TypeError(message)
    return found


def _matrix(content: Mapping[str, Any], path: Path, notes: list[str]) -> Matrix:
    refuse_other_shape(content, MATRIX, "")
    cells = [{**cell, "others": sorted(cell.get("with", {}).items())} for cell in content["cells"]]
    result = record_of(MatrixResult, {**content, "cells": cells, "folder": str(path.parent)})
    runs = tuple(_run_of(cell, path, notes) for cell in result.cells)
    return Matrix(result=result, runs=runs, path=path)


def _run_of(cell: MatrixCell, path: Path, notes: list[str]) -> CheckRun | None:
    if cell.results is None:
        return None
    # As it was written, from where the command ran; or beside the matrix's own file, where the folder was moved.
    candidates = (cell.results, path.parent / cell.results)
    found = next((candidate for candidate in candidates if candidate.is_file()), None)
    if found is None:
        notes.append(f"{cell.held.text}: {cell.results} is gone, so only its summary in {path.name} is told")
        return None
    return CheckRun(label=cell.held.text, result=from_json(read_document(found)), path=found)
