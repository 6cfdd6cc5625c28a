"""The first screen: the verdict, what broke, in which version, and what to do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numerics_suite.core.text import listed
from numerics_suite.judging.kinds import FAILING
from numerics_suite.reporting.html.advice import Advised, advice_on
from numerics_suite.reporting.html.formats import STATUSES, many, sentence

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numerics_suite.reporting.documents import BisectFile, ComparisonFile, Documents
    from numerics_suite.reporting.html.places import Places
    from numerics_suite.reporting.html.problems import Problem

NOTHING_RAN = 5
"""The exit status for which no check ran, or not all that were asked for."""

WORDS = {"fail": "FAIL", "error": "ERROR", "incomplete": "INCOMPLETE", "pass": "PASS", "empty": "EMPTY"}
"""The verdict in a word, worst first."""

FIRST = 4
"""Issues of the first screen; the rest is below, as cards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """One thing that went wrong, as the first screen tells it.

    Attributes:
        title: one sentence.
        facts: labels and texts: what, where, in which version.
        cures: what to do, best first.
        anchor: of the card or section with the rest.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    cures: tuple[Advised, ...]
    anchor: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """The first screen.

    Attributes:
        verdict: a key of :data:`WORDS`.
        headline: one sentence.
        issues: the first few.
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


def story_of(documents: Documents, places: Places, problems: Sequence[Problem]) -> Story:
    """The first screen of a report.

    Args:
        documents: what the report tells of.
        places: every result.
        problems: the cards, in their order.
    """
    counted = Counter(place.result.status for place in places.all)
    issues = [
        *_of_problems(problems),
        *(issue for item in documents.bisections for issue in _of_bisection(item)),
        *(issue for item in documents.comparisons for issue in _of_comparison(item)),
        *_of_errors(places),
    ]
    verdict = _verdict(documents)
    headline = issues[0].title if issues else _calm(documents, counted, verdict)
    return Story(
        verdict=verdict,
        headline=headline,
        issues=tuple(issues[:FIRST]),
        more=max(len(issues) - FIRST, 0),
        counts=tuple((status, counted[status]) for status in STATUSES if counted[status]),
    )


def _verdict(documents: Documents) -> str:
    """The worst that any document says."""
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
    if verdict == "error":
        return "Something could not be carried out"
    if not counted:
        return "No difference that matters"
    what = many(counted["passed"], "result")
    versions = sum(len(matrix.result.cells) for matrix in documents.matrices)
    where = f" in {many(versions, 'environment')}" if versions else ""
    return f"Every check that ran passed: {what}{where}"


def _of_problems(problems: Sequence[Problem]) -> Iterator[Issue]:
    """One issue for each cause in the same versions; what is upstream gives it its title."""
    issues: dict[tuple[object, ...], list[tuple[int, Problem]]] = {}
    for at, problem in enumerate(problems, start=1):
        if not problem.accepted:
            bad = tuple((span.package, span.within, span.first_bad) for span in problem.spans)
            issues.setdefault((problem.finding.cause, bad), []).append((at, problem))
    for members in issues.values():
        at, lead = members[0]
        spans = lead.spans
        versions = f" in {spans[0].package} {spans[0].bad}" if spans and _telling(lead) else ""
        yield Issue(
            title=f"{sentence(lead.finding.title)}{versions}",
            facts=tuple(_facts(lead, [problem for _, problem in members])),
            cures=advice_on([problem for _, problem in members]),
            anchor=f"finding-{at}",
        )


def _telling(problem: Problem) -> bool:
    """Some version lacks it, so the versions that have it say something."""
    return any(span.last_good is not None or span.repaired is not None for span in problem.spans)


def _facts(lead: Problem, members: Sequence[Problem]) -> Iterator[tuple[str, str]]:
    finding = lead.finding
    place = finding.module or listed(list(finding.parameters), 3)
    checks = list(dict.fromkeys(problem.check for problem in members))
    seen = listed(checks, 4)
    yield "What", f"{finding.cause}{f' in {place}' if place else ''}; seen by {seen}"
    subjects = list(dict.fromkeys(name for problem in members for name in problem.subjects))
    precisions = list(dict.fromkeys(name for problem in members for name in problem.precisions))
    yield "Where", f"{listed(subjects, 4)} in {listed(precisions, 6)}"
    for span in lead.spans[:2]:
        parts = [f"{span.package} {span.first_bad} is the first bad one"]
        parts += [f"{span.last_good} before it is good"] if span.last_good else ["nothing older was tried"]
        parts += (
            [f"{span.repaired} is good again"] if span.repaired else [f"{span.newest}, the newest tried, still bad"]
        )
        if not _telling(lead):
            parts = [f"every {span.package} that was tried, {many(span.tried, 'version')} up to {span.newest}"]
        yield "Version", "; ".join(parts) + (f" ({span.within})" if span.within else "")


def _of_errors(places: Places) -> Iterator[Issue]:
    reasons: dict[str, list[str]] = {}
    for place in places.all:
        if place.result.status == "error":
            reasons.setdefault(place.result.reason or "no reason given", []).append(place.result.check)
    for source in places.sources:
        if source.cell is not None and source.cell.status == "error" and source.run is None:
            reasons.setdefault(source.cell.reason or "no reason given", []).append(source.label)
    for reason, checks in reasons.items():
        names = listed(list(dict.fromkeys(checks)), 4)
        facts = (("What", reason), ("Where", f"{many(len(checks), 'result')}: {names}"))
        yield Issue(title=f"Could not be carried out: {names}", facts=facts, cures=(), anchor="errors")


def _of_comparison(comparison: ComparisonFile) -> Iterator[Issue]:
    """One issue for each kind and module of the differences that fail."""
    groups: dict[tuple[str, str | None], list[str]] = {}
    for item in comparison.content["subjects"]:
        if item["kind"] in FAILING:
            groups.setdefault((item["kind"], item.get("module")), []).append(
                f"{item['subject']} in {item['precision']}"
            )
    old, new = comparison.content.get("old", "the old baseline"), comparison.content.get("new", "the new one")
    for (kind, module), cells in groups.items():
        names = listed(list(dict.fromkeys(cells)), 4)
        facts = (
            ("What", f"{kind}{f', first in {module}' if module else ''}"),
            ("Where", names),
            ("Between", f"{old} and {new}"),
        )
        yield Issue(
            title=f"{names}: {kind}{f' from {module} on' if module else ''}",
            facts=facts,
            cures=(),
            anchor="differences",
        )


def _of_bisection(bisection: BisectFile) -> Iterator[Issue]:
    content, finding = bisection.content, bisection.finding
    what, bad, good = content.get("what", "version"), content["first_bad"], content["last_good"]
    title = f"{what} {bad} is the first bad version"
    if finding is not None:
        title += f": {finding.title}"
    facts = [("Version", f"{good} is good, {bad} is bad")]
    if finding is not None:
        facts.append(("What", f"{finding.cause}{f' in {finding.module}' if finding.module else ''}"))
    cures = [Advised(text=f"stay with {what} {good}, or show it:", command=content.get("show"))]
    yield Issue(title=title, facts=tuple(facts), cures=tuple(cures), anchor="bisections")
