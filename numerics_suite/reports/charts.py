"""Small charts in text: curves over training steps, headroom by module, modules over their limits.

They are drawn in block elements; where a stream cannot say these, `sayable` of :mod:`numerics_suite.reports.lines`
puts one ASCII letter for each, so the columns stay where they are.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from numerics_suite.core.numbers import nan_last
from numerics_suite.reports.lines import TerminalLine, wrapped
from numerics_suite.reports.numbers import shown
from numerics_suite.reports.view.finding_text import value_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numerics_suite.core.records import Series

LEVELS = "▁▂▃▄▅▆▇█"
BROKEN = "×"
"""A value that is not finite."""

STEPS = 24
"""Columns of a curve; a longer one has several steps in a column, by the largest of them."""

TOLD = 6
"""Values of a curve that are written out; of a longer one the ends, and what lies beyond them."""

BAR = 16
ROWS = 5
"""Modules that a chart shows, the worst."""

DECADES = 100
"""From this ratio of largest to smallest on, heights are logarithms."""

CURVES = {
    "loss": "loss",
    "gradient-norm": "grad norm",
    "clipped-norm": "clipped",
    "loss-scale": "scale",
}
"""Labels of curves; another's is its own name."""


def chart_lines(
    series: Iterable[Series], *, step: int | None, first: str, column: int, width: int
) -> list[TerminalLine]:
    """The charts of one finding.

    Args:
        series: of its check.
        step: where training broke, None where that is not known.
        first: what stands in front of each label.
        column: columns of a label.
        width: in columns.
    """
    everything = list(series)
    curves = [item for item in everything if item.along == "step"]
    lines = _curves(curves, step, first, column, width) if curves else []
    for item in everything:
        if item.along == "module":
            rows = _least_bits(item) if item.name == "bits" else _over_limits(item)
            lines += _labelled(rows, "headroom" if item.name == "bits" else "over", first, column, width)
    return lines


def sparkline(values: Sequence[float]) -> str:
    """One block for each value, the lowest for the smallest, and a cross where there is no number.

    Args:
        values: where all are alike the blocks are half high.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return BROKEN * len(values)
    least, most = min(finite), max(finite)
    if least > 0 and most / least >= DECADES:
        return sparkline([math.log(value) if math.isfinite(value) else value for value in values])
    span = most - least
    top = len(LEVELS) - 1
    return "".join(
        BROKEN
        if not math.isfinite(value)
        else LEVELS[round((value - least) / span * top) if 0 < span < math.inf else top // 2]
        for value in values
    )


def side_by_side(old: Sequence[float], new: Sequence[float]) -> tuple[str, str]:
    """Two curves on one scale, a column for each step or for several."""
    per = max(1, math.ceil(max(len(old), len(new)) / STEPS))
    before, now = (
        [max(values[begin : begin + per], key=nan_last) for begin in range(0, len(values), per)]
        for values in (old, new)
    )
    drawn = sparkline([*before, *now])
    return drawn[: len(before)], drawn[len(before) :]


# --- curves ------------------------------------------------------------------------------------------------------------


def _curves(curves: Sequence[Series], step: int | None, first: str, column: int, width: int) -> list[TerminalLine]:
    """Curves one below the other, a column for each step, and a mark below the step that broke."""
    places = [at for curve in curves for at in curve.at if isinstance(at, int)]
    last = max([*places, step or 1])
    per = math.ceil(last / STEPS)
    columns = math.ceil(last / per)
    lines = []
    for curve in curves:
        drawn = _columns(curve, per, columns)
        label = f"{first}{CURVES.get(curve.name, curve.name):<{column}}"
        lines += wrapped(told(curve.values), width=width, first=f"{label}{drawn}  ", style="cyan")
    if step is not None:
        mark = " " * (len(first) + column + (step - 1) // per)
        lines.append(TerminalLine(f"{mark}^ step {step}"))
    return lines


def _columns(curve: Series, per: int, columns: int) -> str:
    """The blocks at their steps, blank where there is no value."""
    parts: dict[int, float] = {}
    for at, value in zip(curve.at, curve.values, strict=True):
        assert isinstance(at, int)
        place = (at - 1) // per
        parts[place] = max(parts.get(place, -math.inf), value, key=nan_last)
    blocks = dict(zip(parts, sparkline(list(parts.values())), strict=True))
    return "".join(blocks.get(place, " ") for place in range(columns))


def told(values: Sequence[float]) -> str:
    """The values of a curve, all of a short one.

    Args:
        values: at least one.
    """
    if len(values) <= TOLD:
        return " ".join(shown(value) for value in values)
    begin, end = values[0], values[-1]
    finite = [value for value in values if math.isfinite(value)]
    ends = [value for value in (begin, end) if math.isfinite(value)]
    up = f", up to {shown(max(finite))}" if finite and max(finite) > max(ends, default=-math.inf) else ""
    down = f", down to {shown(min(finite))}" if finite and min(finite) < min(ends, default=math.inf) else ""
    return f"{shown(begin)} → {shown(end)}{up}{down}"


# --- modules -----------------------------------------------------------------------------------------------------------


def _least_bits(series: Series) -> list[tuple[str, str, str]]:
    """Module, bar and number of those with the least headroom; the median module's bar is full.

    Of those that left the range the first alone, in the order in which they ran: it spoils what comes behind it.
    """
    points = [(str(at) or "(model)", value) for at, value in zip(series.at, series.values, strict=True)]
    gone = [name for name, value in points if not value > -math.inf]
    least = sorted((point for point in points if point[1] > -math.inf), key=lambda point: point[1])
    full = least[len(least) // 2][1] if least else 1.0
    more = f", and {len(gone) - 1} after it" if len(gone) > 1 else ""
    rows = [(name, BROKEN.ljust(BAR), f"left the range{more}") for name in gone[:1]]
    return rows + [
        (name, _bar(value, full), f"{shown(value)} {series.unit}") for name, value in least[: ROWS - len(rows)]
    ]


def _bar(value: float, full: float) -> str:
    filled = BAR if value >= full else max(0, math.floor(BAR * value / full))
    return "█" * filled + "░" * (BAR - filled)


def _over_limits(series: Series) -> list[tuple[str, str, str]]:
    """Module and numbers of the points over their limits, the worst first; a single one the finding names already."""
    rows = []
    for at, value, limit in zip(series.at, series.values, series.limits, strict=False):
        if limit is not None and not value <= limit:
            excess = value / limit if limit and math.isfinite(value) else math.inf
            text = value_text(series.name, value, limit, series.unit)
            rows.append((excess, (str(at) or "(model)", "", text)))
    worst = [row for _, row in sorted(rows, key=lambda pair: -pair[0])]
    return worst[:ROWS] if len(worst) > 1 else []


def _labelled(
    rows: Sequence[tuple[str, str, str]], label: str, first: str, column: int, width: int
) -> list[TerminalLine]:
    """Rows of a module, a bar and a number; of a long name the end is shown, which tells more."""
    lines = []
    bars = max((len(bar) + 2 for _, bar, _ in rows if bar), default=0)
    room = width - len(first) - column - bars - 2 - max((len(text) for _, _, text in rows), default=0)
    longest = min(max((len(name) for name, _, _ in rows), default=0), max(room, 8))
    for index, (name, bar, text) in enumerate(rows):
        lead = f"{first}{label if index == 0 else '':<{column}}"
        short = name if len(name) <= longest else f"...{name[3 - longest :]}"
        drawn = f"{bar}  " if bar else ""
        lines.append(TerminalLine(f"{lead}{short:<{longest}}  {drawn}{text}", "cyan", len(lead)))
    return lines
