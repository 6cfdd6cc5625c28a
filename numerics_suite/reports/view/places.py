"""Where a report's results are: every result of every run, and which version each is of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from numerics_suite.core.records import Cell, CheckResult, Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numerics_suite.core.versions import Failure, MatrixCell
    from numerics_suite.reports.documents import CheckRun, Documents, Matrix


ANSWERED = frozenset({"passed", "failed", "accepted"})
"""Statuses of a check that was carried out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One run, or one cell of a matrix of which only the summary is left.

    Attributes:
        label: tells it from the others, empty where there is one.
        run: all of it, None where only the summary is left.
        matrix: index of its matrix, None for a run of its own.
        at: index of its cell in that matrix.
    """

    label: str
    run: CheckRun | None
    matrix: int | None = None
    at: int = 0
    cell: MatrixCell | None = None

    @property
    def results(self) -> tuple[CheckResult, ...]:
        """What checks said; of a summary, those that did not pass."""
        if self.run is not None:
            return self.run.result.checks
        return tuple(_result(failure) for failure in self.cell.failures) if self.cell is not None else ()

    @property
    def diagnosed(self) -> bool:
        """Causes were looked for; without a diagnosis (`--no-diagnose`) printers name none."""
        return self.run is None or bool(self.run.result.settings.get("diagnose", True))


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckCell:
    """What one check said of one cell in one run."""

    source: Source
    result: CheckResult


@dataclass(frozen=True, kw_only=True)
class Places:
    """Every source of a report, runs first, then the cells of the matrices, oldest first."""

    sources: tuple[Source, ...]

    @cached_property
    def all(self) -> tuple[CheckCell, ...]:
        """Every result."""
        return tuple(CheckCell(source=source, result=result) for source in self.sources for result in source.results)

    @cached_property
    def answered(self) -> dict[tuple[int | None, int], frozenset[tuple[str, str]]]:
        """For each cell of a matrix, the checks that were answered there, each with its subject."""
        return {
            (source.matrix, source.at): frozenset(
                (result.check, result.cell.subject) for result in source.results if result.status in ANSWERED
            )
            for source in self.sources
            if source.matrix is not None
        }

    def of_matrix(self, index: int) -> tuple[Source, ...]:
        """The sources of one matrix, a source for each of its cells."""
        return tuple(source for source in self.sources if source.matrix == index)


def places_of(documents: Documents) -> Places:
    """Every result of a report."""
    sources = [
        *_runs(documents.runs),
        *(source for index, matrix in enumerate(documents.matrices) for source in _cells(index, matrix)),
    ]
    if len(sources) == 1:
        sources = [Source(label="", run=sources[0].run, matrix=sources[0].matrix, cell=sources[0].cell)]
    return Places(sources=tuple(sources))


def _runs(runs: Sequence[CheckRun]) -> Iterator[Source]:
    """Two runs of one label are told apart by a number."""
    seen = Counter[str]()
    for run in runs:
        seen[run.label] += 1
        number = seen[run.label]
        yield Source(label=run.label if number == 1 else f"{run.label} ({number})", run=run)


def _cells(index: int, matrix: Matrix) -> Iterator[Source]:
    labels = version_labels(matrix.result.cells)
    for at, (label, cell, run) in enumerate(zip(labels, matrix.result.cells, matrix.runs, strict=True)):
        yield Source(label=label, run=run, matrix=index, at=at, cell=cell)


def version_labels(cells: Sequence[MatrixCell]) -> list[str]:
    """The cells of a matrix by what differs between them: `5.8.0`, or `5.8.0, torch 2.6.0` where torch differs too."""
    torches = {cell.held.torch for cell in cells}
    pythons = {cell.held.python for cell in cells}
    several = len({cell.held.transformers for cell in cells}) > 1
    labels = []
    for cell in cells:
        held = cell.held
        parts = [held.transformers or "?"] if several or len(torches) == len(pythons) == 1 else []
        parts += [f"torch {held.torch or '?'}"] if len(torches) > 1 else []
        parts += [f"python {held.python or '?'}"] if len(pythons) > 1 else []
        parts += [f"{name} {version}" for name, version in held.others]
        labels.append(", ".join(parts))
    return labels


def _result(failure: Failure) -> CheckResult:
    """What a matrix's own file says of a check; the device is not in it."""
    cell = Cell(subject=failure.subject, precision=failure.precision, attn=failure.attn, device="", task=failure.task)
    if failure.status == "error":
        return CheckResult(check=failure.check, cell=cell, status="error", reason=failure.title or None)
    finding = Finding(
        cause=failure.cause or "unknown",
        title=failure.title or f"{failure.check} failed",
        explanation="",
        module=failure.module,
    )
    return CheckResult(check=failure.check, cell=cell, status="failed", finding=finding)
