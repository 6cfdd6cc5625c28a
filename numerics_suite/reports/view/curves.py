"""Series as tables, from which the page draws its plots: what is drawn is what the table says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from numerics_suite.reports.view.formats import exact

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PlotLine:
    """One line of a plot.

    Attributes:
        points: values by step or module.
        limits: limits of the points that have one.
        mark: the step at which something went wrong, None where nothing did.
        marked: what went wrong there.
    """

    label: str
    points: dict[int | str, float]
    limits: dict[int | str, float] | None = None
    mark: int | None = None
    marked: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column of numbers: the values of one curve, or the limits of one or all.

    Attributes:
        kind: `value` or `limit`.
        curve: whose, empty for limits that all share.
        colour: number of the curve's colour and symbol; a curve has the same in all figures of a subject.
    """

    label: str
    kind: str
    curve: str
    colour: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """The moment at which a curve went wrong."""

    curve: str
    step: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row of a table.

    Attributes:
        heads: step, or module, class, unit and layer.
        cells: a text for each column, empty where the curve has no such point.
        over: for each column whether the value is beyond its limit.
    """

    heads: tuple[str, ...]
    cells: tuple[str, ...]
    over: tuple[bool, ...]

    @property
    def text(self) -> str:
        """One line; a tab or a line break in a name would make two of it."""
        cells = (f"{cell}!" if over else cell for cell, over in zip(self.cells, self.over, strict=True))
        return "\t".join((*(" ".join(head.split()) for head in self.heads), *cells))


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What stands beside the name of a module.

    Attributes:
        of: their texts, by module.
    """

    heads: tuple[str, ...]
    of: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A plot and its table.

    Attributes:
        kind: how it is drawn: `steps`, `modules`, `bits` or `pairs`.
        heads: names of the leading columns.
        marks: moments at which something went wrong.
        note: one sentence about it, empty for none.
        folded: the table is text until it is opened: thousands of hidden cells make a page slow.
    """

    kind: str
    title: str
    unit: str
    heads: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    marks: tuple[Mark, ...] = ()
    note: str = ""
    folded: bool = False

    @property
    def text(self) -> str:
        """The table as lines of texts with tabs between; a number beyond its limit ends in `!`."""
        heads = "\t".join((*self.heads, *(column.label for column in self.columns)))
        return "\n".join((heads, *(row.text for row in self.rows)))

    @property
    def columns_data(self) -> list[list[str | int]]:
        """Kind, curve and colour of each column, for the program that makes a table of the text."""
        return [[column.kind, column.curve, column.colour] for column in self.columns]

    @property
    def marks_data(self) -> list[list[str | int]]:
        """The marks for the program that draws."""
        return [[mark.curve, mark.step, mark.text] for mark in self.marks]

    @property
    def size(self) -> int:
        """Numbers in the table."""
        return len(self.rows) * len(self.columns)


def over_steps(title: str, unit: str, curves: Sequence[PlotLine], note: str = "") -> Figure | None:
    """Curves over training steps; None where there is no point.

    Args:
        title: what they show.
        unit: of the values.
        curves: any number; one without a point keeps its colour for other figures.
        note: one sentence.
    """
    colours = {curve.label: at for at, curve in enumerate(curves)}
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return None
    steps = sorted({int(at) for curve in drawn for at in curve.points})
    return Figure(
        kind="steps",
        title=title,
        unit=unit,
        heads=("step",),
        columns=tuple(
            Column(label=curve.label, kind="value", curve=curve.label, colour=colours[curve.label]) for curve in drawn
        ),
        rows=tuple(
            Row(
                heads=(str(step),),
                cells=tuple(_text(curve.points.get(step)) for curve in drawn),
                over=tuple(curve.mark is not None and step >= curve.mark and step in curve.points for curve in drawn),
            )
            for step in steps
        ),
        marks=tuple(
            Mark(curve=curve.label, step=curve.mark, text=_moment(curve.mark, curve.marked))
            for curve in drawn
            if curve.mark is not None
        ),
        note=note,
    )


def over_modules(kind: str, title: str, unit: str, curves: Sequence[PlotLine], told: Beside) -> Figure:
    """One number for each module and curve, with the limits.

    Args:
        kind: how it is drawn.
        title: what it shows.
        unit: of the values, empty where `told` has it.
        curves: at least one.
        told: what stands beside each module's name.
    """
    places = list(dict.fromkeys(str(at) for curve in curves for at in curve.points))
    shared = _shared_limits(curves)
    columns: list[Column] = []
    for at, curve in enumerate(curves):
        columns.append(Column(label=curve.label, kind="value", curve=curve.label, colour=at))
        if curve.limits and shared is None:
            columns.append(Column(label=f"budget of {curve.label}", kind="limit", curve=curve.label))
    if shared:
        columns.append(Column(label="budget", kind="limit", curve=""))
    return Figure(
        kind=kind,
        title=title,
        unit=unit,
        heads=("module", *told.heads),
        columns=tuple(columns),
        rows=tuple(_module_row(place, told.of[place], curves, shared) for place in places),
    )


def _shared_limits(curves: Iterable[PlotLine]) -> dict[int | str, float] | None:
    """The limits where all curves agree on them, None where they do not."""
    shared: dict[int | str, float] = {}
    for curve in curves:
        for at, limit in (curve.limits or {}).items():
            if shared.setdefault(at, limit) != limit:
                return None
    return shared


def _module_row(
    place: str, told: tuple[str, ...], curves: Sequence[PlotLine], shared: dict[int | str, float] | None
) -> Row:
    cells: list[str] = []
    over: list[bool] = []
    for curve in curves:
        value, limit = curve.points.get(place), (curve.limits or {}).get(place)
        cells.append(_text(value))
        over.append(value is not None and limit is not None and not value <= limit)
        if curve.limits and shared is None:
            cells.append(_text(limit))
            over.append(False)
    if shared:
        cells.append(_text(shared.get(place)))
        over.append(False)
    return Row(heads=(place, *told), cells=tuple(cells), over=tuple(over))


def _moment(step: int, marked: str) -> str:
    """`step 2: not finite`; a text that names the step already stays as it is."""
    return marked if "step" in marked else f"step {step}: {marked}"


def _text(value: float | None) -> str:
    return "" if value is None else exact(value)
