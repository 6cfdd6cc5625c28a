"""JUnit XML: a test suite for each run and subject, a test case for each answer.

Written are the attributes that all three viewers read and that Jenkins' schema (junit-10.xsd) knows. GitLab reads `name` of a
suite and `classname`, `name`, `time` and the text of a case; Jenkins those and the counts, `timestamp` and properties of a
suite; the viewers on GitHub the counts, `time` and message. A `file` of a case, which GitLab would read too, is refused by
Jenkins' schema, so the source line stands in the text. The check is the class and the cell is the name: a case keeps its
history while versions come and go, since these are in the suite's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from numerics_suite.core.records import CheckResult, RunResult
from numerics_suite.core.tree import root_id
from numerics_suite.core.versions import MatrixCell
from numerics_suite.judgement.classify import FAILING
from numerics_suite.reports.comparison import MEANS
from numerics_suite.reports.documents import BisectFile, ComparisonFile, Documents
from numerics_suite.reports.findings import block
from numerics_suite.reports.numbers import shown
from numerics_suite.reports.view.bisections import boundary_of
from numerics_suite.reports.view.cards import Card, card_of
from numerics_suite.reports.view.formats import NOTHING_RAN
from numerics_suite.reports.view.places import CheckCell, Source, places_of

NAME = "numerics-suite"

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no place for, not even escaped: most control characters, lone surrogates."""

_BREAKS = re.compile(rb">(<(?:testsuite |testcase |/testsuite))")
"""Where a line may begin: `>` and `<` side by side are never inside a text."""

_HEAD = b"<?xml version='1.0' encoding='utf-8'?>\n"

_LONGEST = 1e9
"""Seconds; more is written as this, for the schema knows no exponent."""


def junit_xml(documents: Documents) -> bytes:
    """The file, in UTF-8; the same bytes for the same documents."""
    suites = [
        *(suite for source in places_of(documents).sources for suite in _of_source(source)),
        *(suite for comparison in documents.comparisons for suite in _of_comparison(comparison)),
        *(_of_bisection(bisection) for bisection in documents.bisections),
    ]
    root = JUnitXml(NAME)
    for suite in suites:
        root.append(suite)
    # One by one: the library would add a count of the skipped, which the schema refuses at this place.
    root.tests = sum(suite.tests for suite in suites)
    root.failures = sum(suite.failures for suite in suites)
    root.errors = sum(suite.errors for suite in suites)
    root.time = round(sum(suite.time for suite in suites), 3)
    text: bytes = root.tostring()
    # The library writes through lxml where that is installed, which knows other blanks.
    return _HEAD + _BREAKS.sub(rb">\n\1", text.removeprefix(_HEAD).replace(b" />", b"/>")) + b"\n"


def _of_source(source: Source) -> Iterator[TestSuite]:
    """A suite for each subject, and one for what concerns the run as a whole."""
    run = None if source.run is None else source.run.result
    by_subject: dict[str, list[CheckResult]] = {}
    for result in source.results:
        by_subject.setdefault(result.cell.subject, []).append(result)
    for subject, results in by_subject.items():
        name = f"{source.label}: {subject}" if source.label else subject
        cases = [_case(CheckCell(source=source, result=result)) for result in results]
        yield _suite(name, cases, _properties(run, subject, source.cell), run)
    whole = list(_of_run(run) if run is not None else _of_summary(source.cell))
    if whole:
        yield _suite(source.label or NAME, whole, _properties(run, None, source.cell), run)


def _suite(name: str, cases: Sequence[TestCase], facts: Mapping[str, Any], run: RunResult | None) -> TestSuite:
    suite = TestSuite(_line(name))
    if run is not None:
        suite.timestamp = fit(run.started_at)
    for key, value in facts.items():
        if value is not None:
            suite.add_property(fit(key), fit(value))
    suite.add_testcases(cases)
    return suite


def _properties(run: RunResult | None, subject: str | None, cell: MatrixCell | None) -> dict[str, Any]:
    """Versions first: a suite's name has only those that differ within the report."""
    facts: dict[str, Any] = {}
    if cell is not None:
        facts |= {name: getattr(cell.held, name) for name in ("transformers", "torch", "python")}
    if run is None:
        return facts
    environment = run.environment
    facts |= dict(environment.get("packages", {}))
    facts |= {name: environment.get(name) for name in ("python", "platform", "device")}
    facts |= {"verdict": run.verdict, "exit_status": run.exit_status, "seed": run.settings.get("seed")}
    for told in run.subjects:
        if told.id == subject:
            facts |= {
                name: getattr(told, name)
                for name in ("family", "model_class", "task", "stored_dtype", "revision", "digest")
            }
    return facts


def _case(place: CheckCell) -> TestCase:
    result = place.result
    case = TestCase(_line(result.cell.id.rstrip("/")), classname=_line(result.check), time=_seconds(result.duration_s))
    card = None if result.finding is None else card_of(place)
    reason = result.reason or "no reason given"
    if result.status == "failed":
        told = reason if card is None else card.sentence
        if root_id(result) != result.id:
            told = f"follows from {root_id(result)}: {told}"
        case.result = _outcome(Failure, told, card.cause or "finding" if card else None, _text(card))
    elif result.status == "accepted":
        case.result = _outcome(Skipped, f"accepted: {reason}", "accepted", _text(card))
    elif result.status == "skipped":
        case.result = _outcome(Skipped, reason, "skipped", "")
    elif result.status == "error":
        case.result = _outcome(Error, reason, "error", "")
    if result.measurements:
        lines = (f"{name} = {shown(value)}" for name, value in result.measurements.items())
        case.system_out = fit("\n".join(lines))
    return case


def _text(card: Card | None) -> str:
    """The block that the terminal shows, with everything that was measured."""
    return "" if card is None else "\n".join(line.text for line in block(card, verbose=True))


def _outcome(kind: type[Any], message: str, type_: str | None, text: str) -> list[Any]:
    outcome = kind(_line(message), _line(type_) if type_ else None)
    if text:
        outcome.text = fit(text)
    return [outcome]


def _of_run(run: RunResult) -> Iterator[TestCase]:
    """What makes the run fail though no check of it does: such as an accept entry that matched nothing, or that nothing ran."""
    told = {result.status for result in run.checks}
    notes = "\n".join(run.notes)
    first = run.notes[0] if run.notes else f"the run ended with exit status {run.exit_status}"
    if run.exit_status == NOTHING_RAN:
        yield _whole(Error, "not all that was asked for was carried out", "incomplete", notes)
    elif run.verdict == "fail" and "failed" not in told:
        yield _whole(Failure, first, "run", notes)
    elif run.verdict == "error" and not told & {"error", "failed"}:
        yield _whole(Error, first, "error", notes)


def _of_summary(cell: MatrixCell | None) -> Iterator[TestCase]:
    """What a matrix says of a cell without a results file."""
    if cell is None:
        return
    reason = cell.reason or "its results file is gone; the matrix's own file tells of it"
    if cell.status == "error":
        yield _whole(Error, reason, "error", "")
    elif cell.status == "unsupported":
        yield _whole(Skipped, reason, "unsupported", "")
    elif cell.status == "failed" and not cell.failures:
        yield _whole(Failure, reason, "run", "")
    elif not cell.failures:
        case = TestCase("environment", classname="run")
        case.system_out = fit(reason)
        yield case


def _whole(kind: type[Any], message: str, type_: str, text: str) -> TestCase:
    case = TestCase("environment" if kind is Skipped else "verdict", classname="run")
    case.result = _outcome(kind, message, type_, text)
    return case


def _of_comparison(comparison: ComparisonFile) -> Iterator[TestSuite]:
    by_subject: dict[str, list[TestCase]] = {}
    for item in comparison.content["subjects"]:
        by_subject.setdefault(str(item["subject"]), []).append(_compared(item))
    for subject, cases in by_subject.items():
        yield _suite(f"compare: {subject}", cases, {}, None)


def _compared(item: Mapping[str, Any]) -> TestCase:
    parts = [str(item[name]) for name in ("subject", "precision", "attn", "device") if item.get(name)]
    case = TestCase(_line("/".join(parts)), classname="compare")
    kind, module, details = str(item["kind"]), item.get("module"), item.get("details")
    why = details.get("why", ()) if isinstance(details, Mapping) else ()
    lines = [*_texts(why), f"error ratio: {shown(item['error_ratio'])}" if item.get("error_ratio") is not None else ""]
    text = "\n".join(line for line in (*lines, MEANS.get(kind, "")) if line)
    if kind in FAILING:
        case.result = _outcome(Failure, f"{kind}{f' in {module}' if module else ''}", kind, text)
    else:
        case.system_out = fit("\n".join(part for part in (kind, text) if part))
    return case


def _texts(value: object) -> list[str]:
    return [str(text) for text in value] if isinstance(value, Iterable) and not isinstance(value, str) else []


def _of_bisection(bisection: BisectFile) -> TestSuite:
    content, finding, found = bisection.content, bisection.finding, boundary_of(bisection)
    name = _line(f"{content.get('what', 'version')} {content['first_bad']}")
    case = TestCase(name, classname=_line(content.get("check", "bisect")))
    facts = (*found.facts, ("why", found.why), ("show it", found.show))
    text = "\n".join(f"{label}: {value}" for label, value in facts if value)
    case.result = _outcome(Failure, found.title, finding.cause if finding else None, text)
    return _suite(f"bisect: {content.get('subject', '')}", [case], {}, None)


def _seconds(value: float) -> float:
    return round(min(value, _LONGEST), 3) if math.isfinite(value) and value > 0 else 0.0


def _line(value: object) -> str:
    return fit(" ".join(str(value).split()))


def fit(value: object) -> str:
    """The text without what XML 1.0 forbids."""
    return _FORBIDDEN.sub("", str(value))
