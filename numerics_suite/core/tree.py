"""Findings as a tree: roots, and what follows from each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numerics_suite.core.records import CheckResult


def is_root(result: CheckResult) -> bool:
    """Whether the result has a finding that follows from no other."""
    return result.finding is not None and result.finding.consequence_of is None


def root_id(result: CheckResult) -> str:
    """Id of the result whose finding is the root of this one: its own where it is a root."""
    return (result.finding.consequence_of if result.finding is not None else None) or result.id


def consequences_of(roots: Iterable[CheckResult], results: Iterable[CheckResult]) -> tuple[CheckResult, ...]:
    """The results whose findings follow from these, in their order."""
    ids = {root.id for root in roots}
    return tuple(one for one in results if one.finding is not None and one.finding.consequence_of in ids)
