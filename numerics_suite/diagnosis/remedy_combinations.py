"""Combinations of remedies of which none helps alone: smallest first, and first those that what is left under one calls for."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from numerics_suite.core.records import Finding, Remedy
from numerics_suite.diagnosis.remedy_register import cures, description_of

LARGEST = 3
"""Remedies of one combination at most, and those that are combined where nothing else is known: the cheapest ones."""

MOST = 8
"""Combinations that are tried at most: each is a load and a few checks of a copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What remedies show together.

    Attributes:
        works: every check that must pass does.
        left: the finding of what still fails, None where nothing does.
    """

    works: bool
    effect: str
    left: Finding | None = None


Together = Callable[[Sequence[str], Mapping[str, Finding]], "Shown | None"]
"""Applies remedies, each for the finding that it is to cure, one on top of the other; None where one cannot be applied."""


def combined(tried: Sequence[Remedy], finding: Finding, moved: Sequence[str], together: Together) -> list[Remedy]:
    """The remedies again, those of the first combination that helps marked with each other.

    What is left under one remedy may have another cause, whose remedies are its partners: these come first, then the rest.

    Args:
        tried: each alone; none is verified.
        finding: that they are to cure.
        moved: names of those under which something else fails than without them.
        together: applies some of them.
    """
    alone = [remedy.name for remedy in tried if remedy.verified is False and remedy.name in cures()]
    meant = dict.fromkeys(alone, finding)
    queue: list[tuple[str, ...]] = []
    queue += [(name,) for name in alone if name in moved][:LARGEST]
    queue += itertools.combinations(alone[:LARGEST], 2)
    asked: set[frozenset[str]] = set()
    while queue and len(asked) < MOST:
        names = queue.pop(0)
        if frozenset(names) in asked:
            continue
        asked.add(frozenset(names))
        shown = together(names, meant)
        if shown is None:
            continue
        if shown.works and len(names) > 1:
            behind = [meant[name].cause for name in names if meant[name].cause != finding.cause]
            told = f"({', '.join(behind)} is behind it) " if behind else ""
            return [*_marked(names, told + shown.effect), *(remedy for remedy in tried if remedy.name not in names)]
        if shown.left is not None and shown.left.cause != finding.cause and len(names) < LARGEST:
            known = (remedy.name for remedy in shown.left.remedies)
            partners = [name for name in known if name in cures() and name not in names]
            meant.update((name, shown.left) for name in partners if name not in meant)
            queue = sorted([*((*names, partner) for partner in partners), *queue], key=len)
    return list(tried)


def _marked(names: Sequence[str], effect: str) -> Iterator[Remedy]:
    for name in names:
        others = tuple(other for other in names if other != name)
        yield Remedy(
            name=name,
            description=description_of(name),
            verified=True,
            effect=f"with {' and '.join(others)}, not alone: {effect}",
            together=others,
        )
