"""In which versions a finding is: the first bad one, the last good one before it, and the one that repaired it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numerics_suite.reports.view.places import CheckCell, Places, Source

PACKAGES = ("transformers", "torch", "python")
"""Packages of every environment; a matrix may vary others too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Versions that have a finding without a break, in a sequence where one package alone changes.

    Attributes:
        within: what the other packages are, empty where they are the same in the whole matrix.
        last_good: the version before the first bad one that was asked and lacks it; None where none was.
        repaired: the version after the last bad one that was asked and lacks it; None where none was.
        newest: the last version that was asked.
        tried: how many versions were asked.
    """

    package: str
    within: str
    first_bad: str
    last_bad: str
    last_good: str | None
    repaired: str | None
    newest: str
    tried: int

    @property
    def bad(self) -> str:
        """`5.8.0`, or `5.8.0 to 5.8.1`."""
        return self.first_bad if self.first_bad == self.last_bad else f"{self.first_bad} to {self.last_bad}"

    @property
    def telling(self) -> bool:
        """Some version lacks the finding, so that those that have it say something."""
        return self.last_good is not None or self.repaired is not None

    def lines(self) -> Iterator[tuple[str, str]]:
        """Labels and texts for a person."""
        within = f" ({self.within})" if self.within else ""
        if not self.telling:
            tried = f"all {self.tried} that were tried, up to" if self.tried > 1 else "the only one tried,"
            yield "bad", f"{tried} {self.package} {self.newest}{within}"
            return
        if self.last_good is not None:
            yield "first bad", f"{self.package} {self.first_bad}{within}"
            yield "last good", f"{self.package} {self.last_good}"
        else:
            yield "bad", f"{self.package} {self.bad}; nothing older was tried{within}"
        if self.repaired is not None:
            yield "good again", f"{self.package} {self.repaired}"
        else:
            yield "still bad", f"{self.package} {self.newest}, the newest that was tried"


def spans_of(found: Sequence[CheckCell], places: Places) -> Iterator[Span]:
    """The spans of one finding, in every sequence of versions of every matrix; the newest first in each."""
    check = found[0].result.check
    subjects = {place.result.cell.subject for place in found}
    for index in sorted({place.source.matrix for place in found if place.source.matrix is not None}):
        bad = {place.source.at for place in found if place.source.matrix == index}
        sources = places.of_matrix(index)
        for package, within, sequence in sequences(sources):
            asked = [source for source in sequence if source.at in bad or _asked(source, check, subjects, places)]
            yield from _spans(package, within, asked, bad)


def sequences(sources: Sequence[Source]) -> list[tuple[str, str, list[Source]]]:
    """The cells of a matrix as sequences in which one package alone changes: its name, the others, the cells.

    Args:
        sources: of one matrix, oldest first.
    """
    cells = [source.cell.held.named for source in sources if source.cell is not None]
    packages = [*PACKAGES, *sorted({name for named in cells for name in named} - set(PACKAGES))]
    held = [[named.get(name) for name in packages] for named in cells]
    varying = [at for at in range(len(packages)) if len({versions[at] for versions in held}) > 1] or [0]
    leading, others = varying[0], varying[1:]
    found: dict[str, list[Source]] = {}
    for source, versions in zip(sources, held, strict=True):
        within = ", ".join(f"{packages[at]} {versions[at] or '?'}" for at in others)
        found.setdefault(within, []).append(source)
    return [(packages[leading], within, members) for within, members in found.items()]


def _asked(source: Source, check: str, subjects: set[str], places: Places) -> bool:
    """The check was answered for one of the subjects; of a summary, that a subject ran must do."""
    if source.run is None:
        return source.cell is not None and any(row.subject in subjects for row in source.cell.rows)
    answered = places.answered[source.matrix, source.at]
    return any((check, subject) in answered for subject in subjects)


def _spans(package: str, within: str, asked: Sequence[Source], bad: set[int]) -> Iterator[Span]:
    def version(at: int) -> str | None:
        cell = asked[at].cell if 0 <= at < len(asked) else None
        return None if cell is None else cell.held.named.get(package, "?")

    last = len(asked) - 1
    while last >= 0:
        if asked[last].at not in bad:
            last -= 1
            continue
        first = last
        while first > 0 and asked[first - 1].at in bad:
            first -= 1
        yield Span(
            package=package,
            within=within,
            first_bad=version(first) or "?",
            last_bad=version(last) or "?",
            last_good=version(first - 1),
            repaired=version(last + 1),
            newest=version(len(asked) - 1) or "?",
            tried=len(asked),
        )
        last = first - 1
