"""The map of checks and cells: a table of checks that needs no program, and columns of numbers for the map itself."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numerics_suite.core.numbers import jsonable
from numerics_suite.reports.view.formats import STATUSES, plain
from numerics_suite.reports.view.measured import Nearest, nearest, question, worst_of
from numerics_suite.reports.view.problems import group_rank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numerics_suite.reports.view.places import CheckCell, Places
    from numerics_suite.reports.view.problems import Problem

LETTERS = {"passed": "p", "failed": "f", "accepted": "a", "skipped": "s", "error": "e"}
ABSENT = "."
"""What the map's text of statuses says where a check did not run on a cell."""

DIMENSIONS = ("subject", "task", "precision", "attn", "device")


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckRow:
    """One check over all cells.

    Attributes:
        counts: results of each status, worst first.
        nearest: the measurement nearest its budget.
    """

    check: str
    question: str
    counts: tuple[int, ...]
    nearest: str
    where: str

    @property
    def status(self) -> str:
        """The worst that occurred."""
        return next((status for status, count in zip(STATUSES, self.counts, strict=True) if count), "skipped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The map.

    Attributes:
        data: for the program: dimensions of the cells, and for each check columns of statuses, numbers and reasons.
        nearest: the passed result that is nearest its budget, empty where no budget judges any.
    """

    rows: tuple[CheckRow, ...]
    data: dict[str, Any]
    cells: int
    results: int
    nearest: str


def grid_of(places: Places, problems: Sequence[Problem]) -> Grid:
    """The map of every result."""
    cards = {id(place.result): at for at, problem in enumerate(problems, start=1) for place in problem.places}
    cells: dict[tuple[Any, ...], int] = {}
    checks: dict[str, list[tuple[int, CheckCell]]] = {}
    for place in places.all:
        cell = place.result.cell
        key = (place.source.label, *(getattr(cell, name) for name in DIMENSIONS))
        checks.setdefault(place.result.check, []).append((cells.setdefault(key, len(cells)), place))
    ordered = sorted(checks, key=group_rank)
    found = {id(place.result): nearest(place.result) for place in places.all}
    columns = _Columns(len(cells), found, cards)
    told = [columns.column(check, checks[check]) for check in ordered]
    return Grid(
        rows=tuple(_row(check, [place for _, place in checks[check]], found) for check in ordered),
        data={
            "dimensions": _dimensions(
                list(cells), versions=any(source.matrix is not None for source in places.sources)
            ),
            "size": len(cells),
            "checks": told,
            "reasons": [plain(reason) for reason in columns.reasons],
        },
        cells=len(cells),
        results=len(places.all),
        nearest=_nearest(places, found),
    )


def _nearest(places: Places, found: dict[int, Nearest | None]) -> str:
    """What passed most narrowly."""
    passed = ((found[id(place.result)], place) for place in places.all if place.result.status == "passed")
    rated = ((value, place) for value, place in passed if value is not None and value.limit)
    value, place = max(rated, key=lambda pair: pair[0].share, default=(None, None))
    return "" if value is None or place is None else f"{place.result.check} {value.text}, {cell_text(place)}"


def _dimensions(keys: Sequence[tuple[Any, ...]], *, versions: bool) -> list[dict[str, Any]]:
    """Each dimension's values, and which of them each cell has."""
    names = ("version" if versions else "file", *DIMENSIONS)
    dimensions = []
    for at, name in enumerate(names):
        values: dict[str, int] = {}
        indices = [values.setdefault(key[at], len(values)) for key in keys]
        dimensions.append({"name": name, "values": [plain(value) for value in values], "at": indices})
    return dimensions


def _row(check: str, members: Sequence[CheckCell], found: dict[int, Nearest | None]) -> CheckRow:
    counted = Counter(place.result.status for place in members)
    worst, where = worst_of(members, lambda result: found[id(result)])
    return CheckRow(
        check=check,
        question=question(check),
        counts=tuple(counted[status] for status in STATUSES),
        nearest="" if worst is None else worst.text,
        where="" if where is None else cell_text(where),
    )


def cell_text(place: CheckCell) -> str:
    """`glm4-tiny / bf16 / sdpa`, with the version where there are several."""
    cell = place.result.cell
    return " / ".join(part for part in (place.source.label, cell.subject, cell.precision, cell.attn) if part)


class _Columns:
    """Columns of checks, with what they share: numbers by result, reasons, cards."""

    def __init__(self, size: int, found: dict[int, Nearest | None], cards: dict[int, int]) -> None:
        self._size, self._found, self._cards = size, found, cards
        self.reasons: dict[str, int] = {}

    def column(self, check: str, members: Sequence[tuple[int, CheckCell]]) -> dict[str, Any]:
        """One check: a letter and a number for each cell; reasons and cards for the few cells that have one."""
        statuses = [ABSENT] * self._size
        values: list[Any] = [None] * self._size
        named = [0] * self._size
        names: dict[tuple[str, float | None], int] = {}
        reasons: dict[str, int] = {}
        cards: dict[str, int] = {}
        for at, place in members:
            result = place.result
            statuses[at] = LETTERS[result.status]
            value = self._found[id(result)]
            if value is not None:
                values[at] = _short(value.value)
                named[at] = names.setdefault((value.name, value.limit), len(names))
            if result.reason:
                reasons[str(at)] = self.reasons.setdefault(result.reason, len(self.reasons))
            if id(result) in self._cards:
                cards[str(at)] = self._cards[id(result)]
        return {
            "id": plain(check),
            "question": question(check),
            "statuses": "".join(statuses),
            "values": values if names else [],
            "named": named if len(names) > 1 else [],
            "names": [[plain(name), jsonable(limit)] for name, limit in names],
            "reasons": reasons,
            "cards": cards,
        }


def _short(value: float) -> Any:
    """Four digits, a whole number as one."""
    if not math.isfinite(value):
        return jsonable(float(value))
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) else short
