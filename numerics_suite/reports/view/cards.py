"""A card for each problem: what every printer says of it, in one order, and what only the roomier ones add."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numerics_suite.core.text import listed
from numerics_suite.reports.view.advice import Advised, advice_on
from numerics_suite.reports.view.causes import sentence_of
from numerics_suite.reports.view.finding_text import (
    batch_text,
    cells_text,
    evidence_rows,
    following_lines,
    measured_text,
    rerun_words,
    scope_text,
    shown_text,
    where_text,
)
from numerics_suite.reports.view.problems import Problem
from numerics_suite.reports.view.reproducers import Scripts, script_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numerics_suite.core.records import Cell, Series
    from numerics_suite.reports.view.places import CheckCell

MOST_ROWS = 40
"""Rows of a card's list of cells; the map has them all."""

MOST_SPANS = 3
"""Stretches of bad versions that a card tells one by one, the newest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What one card shows.

    Attributes:
        number: from 1, in the order of reading.
        sentence: what happens and why, with the cause in brackets.
        cause: its cause, empty without a diagnosis.
        lines: labels and texts that every printer shows, in this order.
        measured: the value beside its limit, empty where neither is known; in `lines` where the sentence does not hold it.
        why: where the limit comes from and what it means to be over it.
        reason: why it was accepted, empty for a failure.
        series: curves and numbers by module of the worst result.
        step: where training broke, None where that is not known.
        cells: rows of version, subject and cells.
        cell_count: results that have it.
        script: text of the reproducer, empty where there is none that can be read.
        script_path: its path, empty without one.
        words: of the command that asks the check again, empty where the run is not known.
    """

    number: int
    status: str
    sentence: str
    check: str
    cause: str
    subjects: tuple[str, ...]
    precisions: tuple[str, ...]
    scope: str
    lines: tuple[tuple[str, str], ...]
    measured: str
    why: str
    reason: str
    evidence: tuple[tuple[str, str], ...]
    batch: str
    series: tuple[Series, ...]
    step: int | None
    cures: tuple[Advised, ...]
    cells: tuple[tuple[str, str, str], ...]
    cell_count: int
    more: int
    script: str
    script_path: str
    words: tuple[str, ...]

    @property
    def anchor(self) -> str:
        """Its place in the page."""
        return f"finding-{self.number}"

    @property
    def group(self) -> str:
        """The group of its check."""
        return self.check.partition(".")[0]

    @property
    def command(self) -> str:
        """The command that asks the check again."""
        return shlex.join(self.words)

    @property
    def fixes(self) -> tuple[str, ...]:
        """What to do, a line each; where nothing is known, where to begin."""
        steps = ["read the code at the place above"] if any(label == "where" for label, _ in self.lines) else []
        steps += ["run the script"] if self.script_path else []
        none = ": ".join(part for part in ("no automatic remedy applies", "; ".join(steps)) if part)
        return tuple(cure.text for cure in self.cures) or (none,)

    @property
    def told(self) -> tuple[str, ...]:
        """What a printer without columns says behind the sentence: check and scope, the lines, the best two fixes."""
        lines = (f"{label}: {text}" for label, text in self.lines)
        return (f"{self.check} on {self.scope}", *lines, *(f"fix: {text}" for text in self.fixes[:2]))

    @property
    def run_script(self) -> str:
        """The command that runs the reproducer, empty without one."""
        return f"python {shlex.quote(self.script_path)}" if self.script_path else ""


def cards_of(problems: Sequence[Problem], scripts: Scripts | None = None) -> tuple[Card, ...]:
    """The cards, in the order of the problems.

    Args:
        problems: equal findings each.
        scripts: where reproducers are read, and how much of them; none of them without it.
    """
    scripts = scripts if scripts is not None else Scripts(left=0)
    return tuple(_card(at, problem, scripts) for at, problem in enumerate(problems, start=1))


def card_of(place: CheckCell, *, diagnosed: bool = True) -> Card:
    """The card of one result alone."""
    return _card(1, Problem(places=(place,)), Scripts(left=0), diagnosed=diagnosed)


def _card(at: int, problem: Problem, scripts: Scripts, *, diagnosed: bool = True) -> Card:
    finding, worst = problem.finding, problem.worst
    diagnosed = diagnosed and worst.source.diagnosed
    rows = list(_rows(problem.places))
    path, text = script_text(problem, scripts)
    labels = tuple(dict.fromkeys(place.source.label for place in problem.places if place.source.label))
    return Card(
        number=at,
        status="accepted" if problem.accepted else "failed",
        sentence=sentence_of(finding, diagnosed=diagnosed),
        check=problem.check,
        cause=finding.cause if diagnosed else "",
        subjects=problem.subjects,
        precisions=problem.precisions,
        scope=scope_text(problem.subjects, (place.result.cell for place in problem.places), labels),
        lines=tuple(line for line in _lines(problem, diagnosed=diagnosed) if line[1]),
        measured=measured_text(worst.result),
        why=finding.explanation,
        reason=(worst.result.reason or "") if problem.accepted else "",
        evidence=evidence_rows(finding),
        batch=batch_text(finding.batch),
        series=worst.result.series,
        step=finding.step,
        cures=advice_on([problem]),
        cells=tuple(rows[:MOST_ROWS]),
        cell_count=len(problem.places),
        more=max(len(rows) - MOST_ROWS, 0),
        script=text,
        script_path=path,
        words=tuple(_words(worst)),
    )


def _lines(problem: Problem, *, diagnosed: bool) -> Iterator[tuple[str, str]]:
    """Place, proof, value, versions, then what follows from it."""
    finding, worst = problem.finding, problem.worst.result
    yield "where", where_text(finding)
    yield "shown by", shown_text(finding) if diagnosed else ""
    # A count that must be zero stands in the sentence already.
    yield "measured", measured_text(worst) if finding.evidence.get("allowed") or "rise" in worst.measurements else ""
    for span in problem.spans[:MOST_SPANS]:
        yield "versions", "; ".join(f"{label} {text}" for label, text in span.lines())
    if len(problem.spans) > MOST_SPANS:
        yield "versions", f"and {len(problem.spans) - MOST_SPANS} earlier stretches; the map has them all"
    for text in following_lines(finding, (place.result for place in problem.consequences)):
        yield "leads to", text
    yield "follows", finding.consequence_of or ""
    yield "accepted", (worst.reason or "") if problem.accepted else ""


def _rows(places: Sequence[CheckCell]) -> Iterator[tuple[str, str, str]]:
    """Version, subject and its cells; versions in which the same cells have it share a row."""
    cells: dict[tuple[str, str], list[Cell]] = {}
    order = {id(place.source): place.source for place in sorted(places, key=_order)}
    for source in order.values():
        for place in places:
            if place.source is source:
                cells.setdefault((source.label, place.result.cell.subject), []).append(place.result.cell)
    rows: dict[tuple[str, str], list[str]] = {}
    for (label, subject), members in cells.items():
        rows.setdefault((subject, cells_text(members)), []).append(label)
    for (subject, text), labels in rows.items():
        yield listed([label for label in labels if label], 8), subject, text


def _order(place: CheckCell) -> tuple[int, int, str]:
    matrix = -1 if place.source.matrix is None else place.source.matrix
    return matrix, place.source.at, place.source.label


def _words(place: CheckCell) -> list[str]:
    """The command that asks the check again of the worst cell, in the version where it failed."""
    run = place.source.run
    if run is None:
        return []
    words = rerun_words(place.result, run.result)
    if place.source.cell is not None:
        held = place.source.cell.held
        words[1] = "matrix"
        others = (("--with", f"{name}=={version}") for name, version in held.others)
        named = (("--transformers", held.transformers), ("--torch", held.torch), ("--python", held.python), *others)
        words += [word for flag, version in named if version for word in (flag, version)]
    return words
