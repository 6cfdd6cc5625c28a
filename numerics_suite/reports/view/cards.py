"""A card for each problem: what, where, why, the evidence, the cures, a script to copy and a command to run again."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numerics_suite.core.text import listed
from numerics_suite.reports.findings import batch_text, cells_text, following_text, rerun_words
from numerics_suite.reports.view.advice import Advised, advice_on
from numerics_suite.reports.view.formats import many, number
from numerics_suite.reports.view.reproducers import script_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numerics_suite.core.records import Cell, Finding
    from numerics_suite.reports.view.places import CheckCell
    from numerics_suite.reports.view.problems import Problem
    from numerics_suite.reports.view.reproducers import Scripts

MOST_ROWS = 40
"""Rows of a card's list of cells; the map has them all."""

MOST_SPANS = 3
"""Stretches of bad versions that a card tells one by one, the newest first."""

NAMED = 6
"""Parameters that a card names before it says how many more there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What one card shows.

    Attributes:
        number: from 1, in the order of reading.
        status: `failed` or `accepted`.
        title: one sentence.
        check: its id.
        cause: its cause.
        subjects: all of them, for the filter.
        precisions: all of them, for the filter.
        summary: in how many cells, subjects and versions, in a few words.
        where: labels and texts of the place in the model.
        measured: the value and what is allowed, empty where neither is known.
        why: the explanation.
        reason: why it was accepted, empty for a failure.
        evidence: names and values.
        batch: the smallest failing batch.
        cures: what to do.
        cells: rows of version, subject and cells.
        cell_count: results that have it.
        more: how many rows were left out.
        versions: one line for each span of versions.
        script: text of the reproducer, empty where there is none that can be read.
        script_path: its path, empty without one.
        command: to ask the check again, empty where the run is not known.
        following: checks that fail as a consequence, empty without any.
    """

    number: int
    status: str
    title: str
    check: str
    cause: str
    subjects: tuple[str, ...]
    precisions: tuple[str, ...]
    summary: str
    where: tuple[tuple[str, str], ...]
    measured: str
    why: str
    reason: str
    evidence: tuple[tuple[str, str], ...]
    batch: str
    cures: tuple[Advised, ...]
    cells: tuple[tuple[str, str, str], ...]
    cell_count: int
    more: int
    versions: tuple[str, ...]
    script: str
    script_path: str
    command: str
    following: str = ""

    @property
    def anchor(self) -> str:
        """Its place in the page."""
        return f"finding-{self.number}"

    @property
    def group(self) -> str:
        """The group of its check."""
        return self.check.partition(".")[0]


def cards_of(problems: Sequence[Problem], scripts: Scripts) -> tuple[Card, ...]:
    """The cards, in the order of the problems.

    Args:
        problems: equal findings each.
        scripts: where reproducers are read, and how much of them.
    """
    return tuple(_card(at, problem, scripts) for at, problem in enumerate(problems, start=1))


def _card(at: int, problem: Problem, scripts: Scripts) -> Card:
    finding, worst = problem.finding, problem.worst
    rows = list(_rows(problem.places))
    path, text = script_text(problem, scripts)
    return Card(
        number=at,
        status="accepted" if problem.accepted else "failed",
        title=finding.title,
        check=problem.check,
        cause=finding.cause,
        subjects=problem.subjects,
        precisions=problem.precisions,
        summary=_summary(problem),
        where=tuple(_where(finding)),
        measured=_measured(finding),
        why=finding.explanation,
        reason=(worst.result.reason or "") if problem.accepted else "",
        evidence=tuple(_evidence(finding)),
        batch=batch_text(finding.batch),
        cures=advice_on([problem]),
        cells=tuple(rows[:MOST_ROWS]),
        cell_count=len(problem.places),
        more=max(len(rows) - MOST_ROWS, 0),
        versions=tuple(_versions(problem)),
        script=text,
        script_path=path,
        command=_command(worst),
        following=following_text(place.result for place in problem.consequences),
    )


def _summary(problem: Problem) -> str:
    """`glm4-tiny in bf16, fp16; 4 cells; transformers 5.8.0`."""
    parts = [f"{listed(problem.subjects, 2)} in {listed(problem.precisions, 3)}"]
    labels = list(dict.fromkeys(place.source.label for place in problem.places if place.source.label))
    cells = len({place.result.cell for place in problem.places})
    if cells > 1:
        parts.append(many(cells, "cell"))
    if len(labels) > 2:
        parts.append(f"{len(labels)} {'versions' if problem.spans else 'files'}, {labels[0]} to {labels[-1]}")
    elif labels:
        parts.append(" and ".join(labels))
    return " · ".join(parts)


def _where(finding: Finding) -> Iterator[tuple[str, str]]:
    if finding.module:
        yield "module", finding.module
    if finding.op:
        yield "op", finding.op
    if finding.source:
        yield "source", finding.source
    if finding.step is not None:
        yield "step", str(finding.step)
    if finding.parameters:
        yield ("parameter" if len(finding.parameters) == 1 else "parameters"), listed(finding.parameters, NAMED)


def _measured(finding: Finding) -> str:
    facts = finding.evidence
    if "measured" not in facts:
        return ""
    unit = f" {facts['unit']}" if facts.get("unit") else ""
    name = f" ({facts['measurement']})" if facts.get("measurement") else ""
    allowed = f"; allowed {number(facts['allowed'])}" if "allowed" in facts else ""
    return f"{number(facts['measured'])}{unit}{name}{allowed}"


def _evidence(finding: Finding) -> Iterator[tuple[str, str]]:
    told = {"measured", "allowed", "unit", "measurement"}
    yield from ((str(name), number(value)) for name, value in finding.evidence.items() if name not in told)


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
        rows.setdefault((subject, cells_text(members).removesuffix(" on ")), []).append(label)
    for (subject, text), labels in rows.items():
        yield listed([label for label in labels if label], 8), subject, text


def _order(place: CheckCell) -> tuple[int, int, str]:
    matrix = -1 if place.source.matrix is None else place.source.matrix
    return matrix, place.source.at, place.source.label


def _versions(problem: Problem) -> Iterator[str]:
    for span in problem.spans[:MOST_SPANS]:
        yield "; ".join(f"{label} {text}" for label, text in span.lines())
    if len(problem.spans) > MOST_SPANS:
        yield f"and {len(problem.spans) - MOST_SPANS} earlier stretches of versions; the map has them all"


def _command(place: CheckCell) -> str:
    """The command that asks the check again of the worst cell, in the version where it failed."""
    run = place.source.run
    if run is None:
        return ""
    words = rerun_words(place.result, run.result)
    if place.source.cell is not None:
        held = place.source.cell.held
        words[1] = "matrix"
        others = (("--with", f"{name}=={version}") for name, version in held.others)
        named = (("--transformers", held.transformers), ("--torch", held.torch), ("--python", held.python), *others)
        words += [word for flag, version in named if version for word in (flag, version)]
    return shlex.join(words)
