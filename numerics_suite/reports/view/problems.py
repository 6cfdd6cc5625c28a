"""Findings as cards: equal ones over cells, subjects and versions are one."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from numerics_suite.core.registry import GROUPS
from numerics_suite.core.tree import root_id
from numerics_suite.reports.view.version_ranges import Span, spans_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numerics_suite.core.records import CheckResult, Finding
    from numerics_suite.reports.view.places import CheckCell, Places

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Equal findings: of one check, with one cause, in the same part of the model.

    Attributes:
        places: where it was found, the worst first.
        spans: in which versions, one for each sequence of versions that was tried.
        consequences: where findings were found that follow from these.
    """

    places: tuple[CheckCell, ...]
    spans: tuple[Span, ...] = field(default=())
    consequences: tuple[CheckCell, ...] = field(default=())

    @property
    def worst(self) -> CheckCell:
        """The one that the card shows."""
        return self.places[0]

    @property
    def finding(self) -> Finding:
        """The worst one's finding."""
        assert self.worst.result.finding is not None
        return self.worst.result.finding

    @property
    def check(self) -> str:
        """Id of the check."""
        return self.worst.result.check

    @property
    def accepted(self) -> bool:
        """The user has accepted it everywhere."""
        return self.worst.result.status == "accepted"

    @property
    def subjects(self) -> tuple[str, ...]:
        """Names of the subjects."""
        return tuple(dict.fromkeys(place.result.cell.subject for place in self.places))

    @property
    def precisions(self) -> tuple[str, ...]:
        """Names of the precisions."""
        return tuple(dict.fromkeys(place.result.cell.precision for place in self.places))


def problems_of(places: Places) -> tuple[Problem, ...]:
    """The cards, in the order in which a person should read them.

    New ones of a version come first, those that the newest version still has before repaired ones; then by the way of
    a value (weights, inputs, forward, reference, training), for what is upstream causes what is downstream.
    """
    groups: dict[tuple[str, ...], list[CheckCell]] = {}
    following: dict[tuple[str, ...], list[CheckCell]] = {}
    found = [place for place in places.all if place.result.finding is not None]
    keys = {(id(place.source), place.result.id): _key(place.result) for place in found}
    for place in found:
        key, root = _key(place.result), keys.get((id(place.source), root_id(place.result)))
        if root is None or root == key:
            groups.setdefault(key, []).append(place)
        else:
            following.setdefault(root, []).append(place)
    problems = [_problem(members, places, following.get(key, ())) for key, members in groups.items()]
    return tuple(sorted(problems, key=_rank))


def _key(result: CheckResult) -> tuple[str, ...]:
    finding = result.finding
    assert finding is not None
    accepted = "accepted" if result.status == "accepted" else "failed"
    return accepted, result.check, finding.cause, part_of(finding)


def part_of(finding: Finding) -> str:
    """The part of the model, whichever layer it is: `model.layers.*.mlp`; the parameters where no module is named."""
    names = [finding.module] if finding.module else sorted(set(finding.parameters))
    return " ".join(dict.fromkeys(_DIGITS.sub("*", name) for name in names))


def _problem(members: Sequence[CheckCell], places: Places, following: Sequence[CheckCell]) -> Problem:
    ordered = tuple(sorted(members, key=_badness, reverse=True))
    return Problem(places=ordered, spans=tuple(spans_of(ordered, places)), consequences=tuple(following))


def _badness(place: CheckCell) -> tuple[bool, float, int]:
    """How bad the measured value is, NaN worst of all; of equals, one that names more places and cures comes first."""
    assert place.result.finding is not None
    finding = place.result.finding
    measured = finding.evidence.get("measured", 0)
    told = len(finding.remedies) + (finding.reproducer is not None) + (finding.module is not None)
    if isinstance(measured, str):
        return False, -math.inf, told
    return (True, 0.0, told) if math.isnan(measured) else (False, float(measured), told)


def _rank(problem: Problem) -> tuple[object, ...]:
    return problem.accepted, _newness(problem.spans), group_rank(problem.check), -len(problem.places)


def _newness(spans: Iterable[Span]) -> int:
    """0 for a regression that the newest version has, 1 for one that was repaired, 2 for what always was."""
    ranks = [2 if span.last_good is None else 1 if span.repaired is not None else 0 for span in spans]
    return min(ranks, default=2)


def group_rank(check: str) -> int:
    """Place of the check's group in the way of a value; groups of others come last."""
    group = check.partition(".")[0]
    return GROUPS.index(group) if group in GROUPS else len(GROUPS)
