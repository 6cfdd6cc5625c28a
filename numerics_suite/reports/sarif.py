"""SARIF 2.1.0, as code scanning takes it: a rule for each check, a result for each problem, whatever cells it is in.

A `fix` of SARIF is an edit of a file, and a remedy is not: the remedies are in the message and in the properties of a result.
What code scanning takes of one file is respected: one run, 25,000 results, rules and their texts as long as it shows them.
Accepted findings are notes, suppressed by their reason; what could not be carried out is a notification of the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numerics_suite import __version__
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.numbers import jsonable
from numerics_suite.core.registry import added_check, own_check_ids
from numerics_suite.core.text import listed
from numerics_suite.judgement.budgets import budgets_of
from numerics_suite.judgement.classify import FAILING
from numerics_suite.reports.comparison import MEANS
from numerics_suite.reports.documents import BisectFile, ComparisonFile, Documents
from numerics_suite.reports.lines import cut, printable
from numerics_suite.reports.markup import text as escaped
from numerics_suite.reports.numbers import shown
from numerics_suite.reports.sources import SourceLine, Sources
from numerics_suite.reports.view.bisections import boundary_of
from numerics_suite.reports.view.cards import Card, cards_of
from numerics_suite.reports.view.measured import question
from numerics_suite.reports.view.places import Places, places_of
from numerics_suite.reports.view.problems import Problem, part_of, problems_of
from numerics_suite.reports.view.sections import reasons_of

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
MOST_RESULTS = 25_000
"""More are refused by code scanning. The worst come first, and a notification counts the rest."""

LONGEST_MESSAGE, LONGEST_RULE = 1_000, 1_024
"""Characters that code scanning shows of a result's message, and of a rule's descriptions."""

ROOTS = {"repository": "%SRCROOT%", "site-packages": "SITE_PACKAGES"}
"""Names of the two roots of paths; their paths on this machine are private."""

NOWHERE = SourceLine(path="pyproject.toml", line=1, root="repository")
"""Code scanning shows no result without a file: where nothing better is known, the file with the settings of the gate."""


def sarif_text(documents: Documents, root: Path | None = None) -> str:
    """The file; the same text for the same documents.

    Args:
        documents: everything that it covers.
        root: of the repository, None to look for it.
    """
    return json.dumps(sarif_log(documents, root), indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def sarif_log(documents: Documents, root: Path | None = None, most: int = MOST_RESULTS) -> dict[str, Any]:
    """The file as JSON's own types.

    Args:
        documents: everything that it covers.
        root: of the repository, None to look for it.
        most: results at most.
    """
    places, sources = places_of(documents), Sources(documents, root)
    problems = problems_of(places)
    results = [
        *(_of_problem(problem, card, sources) for problem, card in zip(problems, cards_of(problems), strict=True)),
        *(result for comparison in documents.comparisons for result in _of_comparison(comparison)),
        *(result for bisection in documents.bisections for result in _of_bisection(bisection, sources)),
    ]
    notes = list(_notifications(documents, places))
    if len(results) > most:
        text = f"{len(results) - most:,} more results than code scanning takes are left out here"
        notes.append({"level": "warning", "message": {"text": text}})
    kept = results[:most]
    rules = list(dict.fromkeys(result["ruleId"] for result in kept))
    for result in kept:
        result["ruleIndex"] = rules.index(result["ruleId"])
    run = {
        "tool": {
            "driver": {
                "name": "numerics-suite",
                "version": __version__,
                "semanticVersion": __version__,
                "rules": [_rule(rule) for rule in rules],
            }
        },
        "automationDetails": {"id": "numerics-suite/"},
        "originalUriBaseIds": {
            "%SRCROOT%": {"description": {"text": "The root of the repository."}},
            "SITE_PACKAGES": {"description": {"text": "Where packages are installed."}},
        },
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": _carried_out(documents, places), "toolExecutionNotifications": notes}],
        "results": kept,
        "properties": {"environments": _environments(places)},
    }
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _of_problem(problem: Problem, card: Card, sources: Sources) -> dict[str, Any]:
    finding, worst = problem.finding, problem.worst.result
    result = _result(
        problem.check,
        "note" if problem.accepted else "error",
        " ".join([card.sentence, *(_ended(line) for line in card.told)]),
        (finding.cause, part_of(finding)),
    )
    result["locations"] = [_location(sources.find(finding.source) or _of_check(problem.check), _named(problem))]
    if problem.accepted:
        reason = printable(worst.reason or "accepted in the settings")
        result["suppressions"] = [{"kind": "external", "status": "accepted", "justification": reason}]
    result["properties"] = {
        "cause": printable(finding.cause),
        "cells": [printable(cell) for cell in dict.fromkeys(place.result.cell.id for place in problem.places)],
        "runs": [printable(label) for label in dict.fromkeys(place.source.label for place in problem.places) if label],
        "evidence": _clean(jsonable(finding.evidence)),
        "remedies": [
            {"name": printable(one.name), "description": printable(one.description), "verified": one.verified}
            | ({"with": [printable(name) for name in one.together]} if one.together else {})
            for one in finding.remedies
        ],
        "consequences": [printable(one) for one in dict.fromkeys(place.result.id for place in problem.consequences)],
    }
    return result


def _named(problem: Problem) -> list[dict[str, Any]]:
    """Module, parameters: where it is in the model, whichever file that is written in."""
    finding = problem.finding
    names = [(finding.module, "module")] if finding.module else [(name, "member") for name in finding.parameters[:10]]
    found = [
        {"fullyQualifiedName": printable(name), "name": printable(name.rpartition(".")[2]) or "model", "kind": kind}
        for name, kind in names
        if name
    ]
    return [one for one in found if one["fullyQualifiedName"]]


def _of_comparison(comparison: ComparisonFile) -> Iterator[dict[str, Any]]:
    """One result for each kind, subject and module of the differences that fail."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for item in comparison.content["subjects"]:
        if item["kind"] in FAILING:
            groups.setdefault((item["kind"], str(item["subject"]), str(item.get("module") or "")), []).append(item)
    for (kind, subject, module), items in groups.items():
        precisions = list(dict.fromkeys(str(item["precision"]) for item in items))
        where = f", first in {module}" if module else ""
        text = f"{subject} in {listed(precisions, 6)}: {kind}{where}. {MEANS[kind]}"
        result = _result(f"compare.{kind}", "error", text, (kind, subject, module))
        named = [{"fullyQualifiedName": printable(module), "kind": "module"}] if module else []
        result["locations"] = [_location(NOWHERE, named)]
        yield result


def _of_bisection(bisection: BisectFile, sources: Sources) -> Iterator[dict[str, Any]]:
    content, finding = bisection.content, bisection.finding
    if finding is None:
        return
    check = str(content.get("check", "bisect"))
    result = _result(check, "error", boundary_of(bisection).title, (finding.cause, part_of(finding), "bisect"))
    named = [{"fullyQualifiedName": printable(finding.module), "kind": "module"}] if finding.module else []
    result["locations"] = [_location(sources.find(finding.source) or _of_check(check), named)]
    yield result


def _result(rule: str, level: str, text: str, identity: Sequence[str]) -> dict[str, Any]:
    """A result without its place; its fingerprint is the same in every run that finds the same thing."""
    digest = hashlib.sha256("\0".join((rule, *identity)).encode("utf-8", "backslashreplace")).hexdigest()
    return {
        "ruleId": printable(rule),
        "level": level,
        "kind": "fail",
        "message": {"text": _shortened(text, LONGEST_MESSAGE)},
        # The first is the one by which code scanning knows an alert again.
        "partialFingerprints": {"primaryLocationLineHash": f"{digest[:16]}:1", "numericsSuite/v1": digest},
    }


def _location(place: SourceLine, named: list[dict[str, Any]]) -> dict[str, Any]:
    artifact = {"uri": place.path, "uriBaseId": ROOTS[place.root]}
    location: dict[str, Any] = {
        "physicalLocation": {"artifactLocation": artifact, "region": {"startLine": place.line}},
    }
    return {**location, **({"logicalLocations": named} if named else {})}


def _of_check(check: str) -> SourceLine:
    """The file of the check, for a finding without a line of its own."""
    if check not in own_check_ids():
        return NOWHERE
    group, name = check.split(".")
    path = f"numerics_suite/checks/{group}/{name.replace('-', '_')}.py"
    return SourceLine(path=path, line=1, root="site-packages")


def _rule(check: str) -> dict[str, Any]:
    kind = check.removeprefix("compare.") if check.startswith("compare.") else ""
    asked = MEANS[kind] if kind in MEANS else question_of(check)
    budgets = {} if kind in MEANS else _budgets(check)
    lines = [f"- {name}: at most {shown(budget.limit)}. {budget.reason}" for name, budget in budgets.items()]
    description = " ".join([asked, *dict.fromkeys(budget.reason for budget in budgets.values())])
    title = "".join(word.capitalize() for word in check.replace("-", ".").split(".") if word)
    return {
        "id": check,
        "name": _shortened(title or "Check", 255),
        "shortDescription": {"text": _shortened(asked, LONGEST_RULE)},
        "fullDescription": {"text": _shortened(description, LONGEST_RULE)},
        "help": {
            "text": "\n".join([asked.replace("](", "] ("), *lines]),
            "markdown": "\n".join([f"**{asked if check in own_check_ids() else escaped(asked)}**", "", *lines]),
        },
        "defaultConfiguration": {"level": "error"},
        "properties": {
            "tags": ["numerics", printable(check.partition(".")[0])],
            "precision": "very-high",
            "problem.severity": "error",
        },
    }


def _budgets(check: str) -> dict[str, Any]:
    try:
        return budgets_of(check)
    except BadInputError:  # another package's, which is not as it was when the results were written
        return {}


def question_of(check: str) -> str:
    """The question that a check asks; the id of a check that is not known here."""
    if check in own_check_ids():
        return question(check) or check
    try:
        added = added_check(check)
    except BadInputError:
        added = None
    return added.spec.doc if added is not None else printable(check)


def _notifications(documents: Documents, places: Places) -> Iterator[dict[str, Any]]:
    for one in reasons_of(places, "error"):
        text = f"{one.checks} could not be carried out on {one.where}: {one.reason}"
        yield {"level": "error", "message": {"text": _shortened(text, LONGEST_MESSAGE)}}
    for source in places.sources:
        if source.run is None and source.cell is not None and source.cell.reason:
            text = f"{source.label or 'the environment'}: {source.cell.reason}"
            level = "error" if source.cell.status == "error" else "note"
            yield {"level": level, "message": {"text": _shortened(text, LONGEST_MESSAGE)}}
    for note in documents.every_note:
        yield {"level": "warning", "message": {"text": _shortened(note, LONGEST_MESSAGE)}}


def _carried_out(documents: Documents, places: Places) -> bool:
    cells = (cell.status for matrix in documents.matrices for cell in matrix.result.cells)
    verdicts = (run.result.verdict for run in documents.every_run)
    answers = (place.result.status for place in places.all)
    return "error" not in {*cells, *verdicts, *answers}


def _environments(places: Places) -> list[dict[str, str]]:
    found = []
    for source in places.sources:
        environment = source.run.result.environment if source.run is not None else {}
        facts = {"run": source.label or None, **{name: environment.get(name) for name in ("python", "device")}}
        facts |= dict(environment.get("packages", {}))
        found.append({printable(str(key)): printable(str(value)) for key, value in facts.items() if value is not None})
    return found


def _ended(text: str) -> str:
    """A sentence with its full stop; nothing in it is a link of SARIF's."""
    line = printable(text).rstrip(" .")
    return f"{line}."


def _shortened(text: str, most: int) -> str:
    """One line of so many characters; what SARIF would read as a link is written so that it is none."""
    return cut(printable(text).replace("](", "] ("), most)


def _clean(value: Any) -> Any:
    """JSON whose texts can be written in UTF-8 and shown."""
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, Mapping):
        return {printable(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, Iterable):
        return [_clean(item) for item in value]
    return value
