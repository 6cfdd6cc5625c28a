"""The first screen: the verdict, what broke, in which version, and what to do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from numerics_suite.core.text import listed
from numerics_suite.judgement.classify import FAILING, KINDS
from numerics_suite.reports.comparison import MEANS
from numerics_suite.reports.view.advice import Advised, advice_on
from numerics_suite.reports.view.bisections import boundary_of
from numerics_suite.reports.view.differences import versions_of
from numerics_suite.reports.view.formats import NOTHING_RAN, STATUSES, many, sentence

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numerics_suite.reports.documents import BisectFile, CheckRun, ComparisonFile, Documents
    from numerics_suite.reports.view.cards import Card
    from numerics_suite.reports.view.places import Places
    from numerics_suite.reports.view.problems import Problem

WORDS = {"fail": "FAIL", "error": "ERROR", "incomplete": "INCOMPLETE", "pass": "PASS", "empty": "EMPTY"}
"""The verdict in a word, worst first."""

FIRST = 4
"""Issues of the first screen; the rest is below, as cards."""


Facts: TypeAlias = "tuple[tuple[str, str], ...]"
"""Labels and texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """One thing that went wrong, as the first screen tells it.

    Attributes:
        why: what it means, empty where that is not known.
        versions: labels and texts, empty where versions tell nothing.
        anchor: of the card or section with the rest.
    """

    title: str
    what: Facts
    versions: Facts
    where: Facts
    cures: tuple[Advised, ...]
    anchor: str
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """The first screen.

    Attributes:
        verdict: a key of :data:`WORDS`.
        more: how many there are beyond these.
        counts: results by status, worst first, without those that did not occur.
    """

    verdict: str
    headline: str
    issues: tuple[Issue, ...]
    more: int
    counts: tuple[tuple[str, int], ...]

    @property
    def word(self) -> str:
        """The verdict in a word."""
        return WORDS[self.verdict]


def story_of(documents: Documents, places: Places, problems: Sequence[Problem], cards: Sequence[Card]) -> Story:
    """The first screen of a report."""
    counted = Counter[str](place.result.status for place in places.all)
    issues = [
        *_of_problems(problems, cards),
        *(_of_bisection(item) for item in documents.bisections),
        *(issue for item in documents.comparisons for issue in _of_comparison(item)),
        *_of_errors(places),
    ]
    verdict = verdict_of(documents)
    headline = issues[0].title if issues else _calm(documents, counted, verdict)
    return Story(
        verdict=verdict,
        headline=headline,
        issues=tuple(issues[:FIRST]),
        more=max(len(issues) - FIRST, 0),
        counts=tuple((status, counted[status]) for status in STATUSES if counted[status]),
    )


def verdict_of(documents: Documents) -> str:
    """The worst that any document says, a key of :data:`WORDS`."""
    said = {
        "incomplete" if run.result.exit_status == NOTHING_RAN else str(run.result.verdict) for run in documents.runs
    }
    by_exit = {0: "pass", 1: "fail", 3: "error"}
    said |= {by_exit.get(matrix.result.exit_status, "incomplete") for matrix in documents.matrices}
    for comparison in documents.comparisons:
        kinds = {item["kind"] for item in comparison.content["subjects"]}
        said.add("fail" if kinds & FAILING else "pass")
    said |= {"fail" for _ in documents.bisections}
    return next((verdict for verdict in WORDS if verdict in said), "empty")


def _calm(documents: Documents, counted: Counter[str], verdict: str) -> str:
    """The headline where nothing is wrong."""
    if verdict == "empty":
        return "There is nothing to report"
    if verdict == "incomplete":
        return f"Not everything was carried out: {many(counted['skipped'], 'check')} skipped"
    if verdict in {"fail", "error"}:
        # Without a finding or an error of a check, such as an accepted finding that nothing matched: a note says why.
        notes = [note for run in documents.every_run for note in run.result.notes]
        return sentence(notes[0]) if notes else "It did not pass, and no check says why"
    if not counted:
        return "No difference that matters"
    what = many(counted["passed"], "result")
    versions = sum(len(matrix.result.cells) for matrix in documents.matrices)
    where = f" in {many(versions, 'environment')}" if versions else ""
    return f"Every check that ran passed: {what}{where}"


def _of_problems(problems: Sequence[Problem], cards: Sequence[Card]) -> Iterator[Issue]:
    """One issue for each cause in the same versions; what is upstream gives it its sentence."""
    issues: dict[tuple[object, ...], list[tuple[Problem, Card]]] = {}
    for problem, card in zip(problems, cards, strict=True):
        if not problem.accepted:
            bad = tuple((span.package, span.within, span.first_bad) for span in problem.spans)
            issues.setdefault((problem.finding.cause, bad), []).append((problem, card))
    for members in issues.values():
        (lead, card), known = members[0], [problem for problem, _ in members]
        span = lead.spans[0] if lead.spans and lead.spans[0].telling else None
        versions = f"In {span.package} {span.bad}: " if span is not None else ""
        checks = listed(list(dict.fromkeys(problem.check for problem in known)), 4)
        yield Issue(
            title=f"{versions}{card.sentence}",
            what=(*(line for line in card.lines if line[0] != "versions"), ("seen by", checks)),
            versions=tuple(line for span in lead.spans[:1] for line in span.lines()),
            where=tuple(_where(known)),
            cures=advice_on(known),
            why=lead.finding.explanation,
            anchor=card.anchor,
        )


def _where(members: Sequence[Problem]) -> Iterator[tuple[str, str]]:
    subjects = list(dict.fromkeys(name for problem in members for name in problem.subjects))
    precisions = list(dict.fromkeys(name for problem in members for name in problem.precisions))
    yield ("subject" if len(subjects) == 1 else "subjects"), listed(subjects, 4)
    yield ("precision" if len(precisions) == 1 else "precisions"), listed(precisions, 6)
    cells = {place.result.cell for problem in members for place in problem.places}
    if len(cells) > 1:
        yield "cells", f"{len(cells):,}"


def _of_errors(places: Places) -> Iterator[Issue]:
    """One issue for each reason, of checks and of whole versions."""
    checks: dict[str, list[str]] = {}
    for place in places.all:
        if place.result.status == "error":
            checks.setdefault(place.result.reason or "no reason given", []).append(place.result.check)
    versions: dict[str, list[str]] = {}
    for source in places.sources:
        if source.cell is not None and source.cell.status == "error" and not source.results:
            # The path of a log differs from version to version; it stands in the section of versions.
            reason = (source.cell.reason or "no reason given").partition(" (log: ")[0]
            versions.setdefault(reason, []).append(source.label or source.cell.held.text)
    for found, noun, anchor in ((versions, "version", "versions"), (checks, "check", "errors")):
        for reason, names in found.items():
            told = listed(list(dict.fromkeys(names)), 4)
            yield Issue(
                title=f"Could not be carried out: {told}",
                what=(("reason", reason),),
                versions=(),
                where=((noun if len(set(names)) == 1 else f"{noun}s", told),),
                cures=(),
                anchor=anchor,
            )


def _of_comparison(comparison: ComparisonFile) -> Iterator[Issue]:
    """One issue for each kind and module of the differences that fail."""
    groups: dict[tuple[str, str | None], list[Mapping[str, Any]]] = {}
    for item in comparison.content["subjects"]:
        if item["kind"] in FAILING:
            groups.setdefault((item["kind"], item.get("module")), []).append(item)
    moved = versions_of(comparison)
    for (kind, module), items in sorted(groups.items(), key=lambda item: KINDS.index(item[0][0])):
        names = listed(list(dict.fromkeys(str(item["subject"]) for item in items)), 4)
        precisions = listed(list(dict.fromkeys(str(item["precision"]) for item in items)), 6)
        what = [("kind", kind), *([("starts in", module)] if module else [])]
        yield Issue(
            title=f"{names}: {kind}{f' from {module} on' if module else ''}{moved.headline}",
            what=tuple(what),
            versions=moved.lines,
            where=(("subjects", names), ("precisions", precisions)),
            cures=(
                Advised(action=f"stay with {moved.old} until it is clear what that means for your code", advice=True),
            ),
            anchor="differences",
            why=MEANS[kind],
        )


def _of_bisection(bisection: BisectFile) -> Issue:
    found = boundary_of(bisection)
    ends = [fact for fact in found.facts if fact[0] in {"last good", "first bad", "between"}]
    return Issue(
        title=found.title,
        what=tuple(fact for fact in found.facts if fact[0] in {"check", "kind", "where"}),
        versions=tuple(ends),
        where=tuple(fact for fact in found.facts if fact[0] == "subject"),
        cures=found.cures,
        why=found.why,
        anchor="bisections",
    )


def about(documents: Documents) -> str:
    """What the report covers, in one line: commands, versions, devices."""
    parts = []
    for matrix in documents.matrices:
        cells = matrix.result.cells
        versions = list(dict.fromkeys(cell.held.transformers or "?" for cell in cells))
        span = versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}" if versions else "none"
        parts.append(f"matrix of {many(len(cells), 'environment')}, transformers {span}")
    if len(documents.runs) == 1:
        parts.append(f"{documents.runs[0].result.command} of {_environment(documents.runs[0])}")
    elif documents.runs:
        parts.append(f"{len(documents.runs)} runs of check")
    parts += [versions_of(item).about for item in documents.comparisons]
    parts += [f"bisect of {item.content.get('what', 'versions')}" for item in documents.bisections]
    return " · ".join(parts)


def _environment(run: CheckRun) -> str:
    result = run.result
    packages = result.environment.get("packages", {})
    versions = [f"{name} {packages[name]}" for name in ("transformers", "torch") if name in packages]
    subjects = listed([subject.id for subject in result.subjects], 2) or "no subject"
    device = result.environment.get("device")
    return ", ".join([subjects, *versions, *([f"on {device}"] if device else []), result.started_at[:10]])
