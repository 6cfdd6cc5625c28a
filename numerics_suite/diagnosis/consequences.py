"""Which findings follow from another one, by evidence that both carry; in the order of the plan the first is the root.

A finding is a consequence where it names nothing that a root does not: the same parameters that are not finite, the same exception at
the same line, or the same op of the same module at which a value stops being finite. It is one where the break of a law implies its
own (:mod:`numerics_suite.diagnosis.implications`). A remedy that acts on the root's own place and
cures the other check too is tried while the cell is loaded (:mod:`numerics_suite.diagnosis.roots`). Whatever shares none of this
stays a root, and so does what the root's remedy does not cure, or only with another one: two defects of one model are two findings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from numerics_suite.diagnosis.implications import first_cause

if TYPE_CHECKING:
    from numerics_suite.core.records import CheckResult, Finding

UNSOUND = frozenset({"uninitialised-parameters", "uninitialised-buffer", "corrupt-weights"})
"""Causes whose parameters are not finite themselves."""

LACKING = frozenset({"missing-weights", "lost-head"})
"""Causes whose parameters nothing fills, so that they may be found not finite further on."""

AT_AN_OP = frozenset({"overflow", "underflow", "invalid-operation", "fully-masked-row"})
"""Causes that are seen at one op, where a value stops being finite."""

RAISES = "model-raises"

NO_RUN = (RuntimeError, ValueError, TypeError, KeyError, IndexError)
"""What a model raises that cannot be run on a batch; a trial or replay that ends so has shown what it could."""

Covers = Callable[["CheckResult", "CheckResult"], bool]
"""Whether the acceptance of the first, a root, reaches the second."""


def as_tree(results: Sequence[CheckResult], covers: Covers) -> list[CheckResult]:
    """The results with each consequence pointing to its root; what follows from an accepted root is accepted with its reason.

    Args:
        results: of a whole run, in the order of the plan.
        covers: an entry that accepts a root may be for one precision only; what it does not reach has a root of its own.
    """
    roots: list[CheckResult] = []
    known: dict[str, tuple[Finding, CheckResult]] = {}
    told = []
    for result in results:
        if result.finding is not None:
            root = _root_of(result, result.finding, roots, known, covers)
            if root is None:
                roots.append(replace(result, finding=replace(result.finding, consequence_of=None)))
            known[result.id] = result.finding, root or roots[-1]
            told.append(_following(result, root, covers))
        else:
            told.append(result)
    implied = {root.id: _implied_by(root, roots, covers) for root in roots}
    return [
        result if result.finding is None else _following(result, _first(known[result.id][1], implied), covers)
        for result in told
    ]


def _first(root: CheckResult, implied: Mapping[str, CheckResult | None]) -> CheckResult:
    """The root that nothing implies, from one to the next."""
    passed = {root.id}
    while (cause := implied[root.id]) is not None and cause.id not in passed:
        root = cause
        passed.add(root.id)
    return root


def _following(result: CheckResult, root: CheckResult | None, covers: Covers) -> CheckResult:
    """The result as a consequence of the root, or as one itself; what follows from an accepted one is accepted with its reason."""
    assert result.finding is not None
    if root is None or root.id == result.id:
        return replace(result, finding=replace(result.finding, consequence_of=None))
    told = replace(result, finding=replace(result.finding, consequence_of=root.id))
    if root.status == "accepted" and covers(root, result):
        return replace(told, status="accepted", reason=root.reason)
    return told


def _implied_by(result: CheckResult, roots: Sequence[CheckResult], covers: Covers) -> CheckResult | None:
    """The root of the same cell whose law implies this one's break."""
    assert result.finding is not None
    if _has_more_causes(result.finding):
        return None
    reached = [
        root
        for root in roots
        if root.cell == result.cell
        and root.finding is not None
        and not _outlasts(result.finding, root.finding)
        and (root.status != "accepted" or covers(root, result))
    ]
    return first_cause(reached, result)


def _root_of(
    result: CheckResult,
    finding: Finding,
    roots: Sequence[CheckResult],
    known: Mapping[str, tuple[Finding, CheckResult]],
    covers: Covers,
) -> CheckResult | None:
    reached = [
        root for root in roots if _one_subject(root, result) and (root.status != "accepted" or covers(root, result))
    ]
    _, tried = known.get(finding.consequence_of or "", (None, None))
    if tried is not None and any(root.id == tried.id for root in reached):
        return tried
    if _has_more_causes(finding):
        return None
    reached = [root for root in reached if root.finding is not None and not _outlasts(finding, root.finding)]
    # What shows the same as a consequence follows from that one's root: one exception has one root, whoever met it first.
    ids = {root.id for root in reached}
    for other, root in known.values():
        if root.id in ids and _shows(other, finding):
            return root
    return _of_parameters(finding, reached)


def _has_more_causes(finding: Finding) -> bool:
    """Whether remedies cure it together only: each is for a cause of its own."""
    verified = [remedy for remedy in finding.remedies if remedy.verified]
    return bool(verified) and all(remedy.together for remedy in verified)


def _outlasts(finding: Finding, root: Finding) -> bool:
    """Whether what cures the root was tried on the finding and does not cure it."""
    cures = {remedy.name for remedy in root.remedies if remedy.verified and not remedy.together}
    return any(remedy.name in cures and remedy.verified is False for remedy in finding.remedies)


def _one_subject(one: CheckResult, other: CheckResult) -> bool:
    return (one.cell.subject, one.cell.task) == (other.cell.subject, other.cell.task)


def _shows(root: Finding, finding: Finding) -> bool:
    """The same exception, the same op of the same module, or parameters that do not move for want of the gradient that the root misses."""
    if (root.cause, finding.cause) == ("dead-gradient", "untrained-parameters"):
        return bool(finding.parameters) and set(finding.parameters) <= set(root.parameters)
    if (root.cause, finding.cause) == ("wrong-output-shape", RAISES):
        # Without labels it runs: logits of each token and one label for each row do not fit in any loss.
        return str(finding.evidence.get("call", "")).startswith("forward and backward")
    if finding.cause != root.cause:
        return False
    if finding.cause == RAISES:
        return raised(finding) == raised(root)
    if finding.cause in AT_AN_OP:
        place = (finding.module, finding.op, finding.source)
        return finding.op is not None and place == (root.module, root.op, root.source)
    return False


def raised(finding: Finding) -> tuple[str, str]:
    """Type and line of the exception that the finding is of."""
    return str(finding.evidence.get("exception", "")).partition(":")[0], str(finding.evidence.get("line", ""))


def _leaves_unsound(root: Finding) -> bool:
    """Whether the root's parameters may be found not finite; so are stored ones that overflow in the dtype of the load, at no op."""
    return root.cause in UNSOUND | LACKING or (root.cause == "overflow" and root.op is None)


def _of_parameters(finding: Finding, roots: Sequence[CheckResult]) -> CheckResult | None:
    """The first root that names a parameter of the finding, where roots name them all: one that is new is another defect."""
    if finding.cause not in UNSOUND or not finding.parameters:
        return None
    left, first = set(finding.parameters), None
    for root in roots:
        if root.finding is None or not _leaves_unsound(root.finding):
            continue
        named = left & set(root.finding.parameters)
        first = first or (root if named else None)
        left -= named
    return None if left else first
