"""Findings as a tree: roots, and what follows from each."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numerics_suite.core.records import CheckResult


def is_root(result: CheckResult) -> bool:
    """Whether the result has a finding that follows from no other."""
    return result.finding is not None and result.finding.consequence_of is None


def root_id(result: CheckResult) -> str:
    """Id of the result whose finding is the root of this one: its own where it is a root."""
    return (result.finding.consequence_of if result.finding is not None else None) or result.id
