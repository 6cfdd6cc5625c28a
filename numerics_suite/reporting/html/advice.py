"""What to do about a finding: another version where one is good, and the cures that were tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numerics_suite.core.records import Remedy
    from numerics_suite.reporting.html.problems import Problem
    from numerics_suite.reporting.html.spans import Span

MOST = 4
"""Pieces of advice of one issue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advised:
    """One thing to do.

    Attributes:
        text: one sentence.
        tried: True where it was seen to work, False where it was seen not to, None where nobody tried.
        command: to copy, None without.
    """

    text: str
    tried: bool | None = None
    command: str | None = None


def advice_on(problems: Sequence[Problem]) -> tuple[Advised, ...]:
    """What to do about findings of one cause: versions first, then cures that work, then those that nobody tried.

    Args:
        problems: the first of them is told.
    """
    advised = list(_versions(problems[0].spans))
    remedies: dict[str, Remedy] = {}
    for problem in problems:
        for remedy in problem.finding.remedies:
            known = remedies.get(remedy.name)
            if known is None or (known.verified is not True and remedy.verified is not None):
                remedies[remedy.name] = remedy
    versioned = {"newer-version", "pin-version"} if advised else set()
    advised += [
        _cure(remedy)
        for wanted in (True, None, False)
        for remedy in remedies.values()
        if remedy.verified is wanted and remedy.name not in versioned
    ]
    useful = [item for item in advised if item.tried is not False]
    return tuple((useful or advised)[:MOST])


def _versions(spans: Sequence[Span]) -> Iterator[Advised]:
    for span in spans[:1]:
        older = f"{span.package} {span.last_good}" if span.last_good else ""
        newer = f"{span.package} {span.repaired} or newer" if span.repaired else ""
        if newer:
            text = f"use {newer}{f', or stay with {older}' if older else ''}"
            yield Advised(text=f"{text}; leave out {span.bad}", tried=True)
        elif older:
            yield Advised(text=f"stay with {older}", tried=True)


def _cure(remedy: Remedy) -> Advised:
    effect = f" ({remedy.effect})" if remedy.effect else ""
    return Advised(text=f"{remedy.name}: {remedy.description}{effect}", tried=remedy.verified)
