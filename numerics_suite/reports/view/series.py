"""Which series the page shows: of each subject and precision those of the cell that measured worst."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from numerics_suite.reports.view.curves import Beside, Figure, PlotLine, over_modules, over_steps
from numerics_suite.reports.view.formats import many, number
from numerics_suite.reports.view.measured import share_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numerics_suite.core.records import Series
    from numerics_suite.reports.view.places import CheckCell, Places

POINTS = 40_000
"""Numbers that all tables of one kind may hold; subjects beyond it are counted and left out, the worst never."""

TABLES = 4_000
"""Numbers of one kind that stand in tables from the start; beyond it a table is made when it is opened."""

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plotted:
    """The figures of one subject."""

    subject: str
    task: str
    figures: tuple[Figure, ...]
    summary: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chapter:
    """All figures of one kind.

    Attributes:
        subjects: the worst first.
        left_out: what is not shown and where it is, empty where all is shown.
    """

    subjects: tuple[Plotted, ...]
    left_out: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Candidate:
    """A result with series, and how bad it is."""

    place: CheckCell
    badness: float


class Chapters:
    """The figures of a report, made from the series of its results."""

    def __init__(self, places: Places) -> None:
        """Look at every result once."""
        self._places = places
        self._by_check: dict[str, list[CheckCell]] = {}
        for place in places.all:
            if place.result.series:
                self._by_check.setdefault(place.result.check, []).append(place)
        cells = [place.result.cell for members in self._by_check.values() for place in members]
        self._attns = len({cell.attn for cell in cells}) > 1
        self._devices = len({cell.device for cell in cells}) > 1
        self._labels = len({place.source.label for members in self._by_check.values() for place in members}) > 1

    def precision(self) -> Chapter:
        """The error of each module on its own, with its budget."""
        return self._chapter("reference.local", _excess, self._error)

    def headroom(self) -> Chapter:
        """Bits between the largest activation of each module and the dtype's largest number."""
        return self._chapter("forward.headroom", _lack, self._bits)

    def training(self) -> Chapter:
        """Loss, gradient norm and loss scale over the steps."""
        return self._chapter("train.finite", _divergence, self._curves)

    def _label(self, place: CheckCell) -> str:
        cell = place.result.cell
        parts = [cell.precision]
        parts += [cell.attn] if self._attns else []
        parts += [cell.device] if self._devices and cell.device else []
        parts += [place.source.label] if self._labels and place.source.label else []
        return " · ".join(parts)

    def _chapter(
        self,
        check: str,
        badness: Callable[[CheckCell], float],
        draw: Callable[[str, str, list[CheckCell]], Iterator[tuple[str, Figure]]],
    ) -> Chapter:
        members = self._by_check.get(check, [])
        worst: dict[tuple[str, str], dict[str, _Candidate]] = {}
        for place in members:
            cell = place.result.cell
            precisions = worst.setdefault((cell.subject, cell.task), {})
            bad = badness(place)
            if cell.precision not in precisions or bad > precisions[cell.precision].badness:
                precisions[cell.precision] = _Candidate(place=place, badness=bad)
        ordered = sorted(worst.items(), key=lambda item: -max(found.badness for found in item[1].values()))
        subjects: list[Plotted] = []
        spent = shown = 0
        for (subject, task), precisions in ordered:
            places = [found.place for found in precisions.values()]
            told = list(draw(subject, task, places))
            spent += sum(figure.size for _, figure in told)
            if subjects and spent > POINTS:
                break
            shown += len(places)
            folded = bool(subjects) and spent > TABLES
            summary = next((text for text, _ in told if text), "")
            figures = tuple(replace(figure, folded=folded) for _, figure in told)
            subjects.append(Plotted(subject=subject, task=task, figures=figures, summary=summary))
        return Chapter(
            subjects=tuple(subjects), left_out=self._left_out(len(members) - shown, len(worst) - len(subjects))
        )

    def _left_out(self, cells: int, subjects: int) -> str:
        if not cells:
            return ""
        files = [source.run.path for source in self._places.sources if source.run and source.run.path]
        where = f"the results file {files[0].name}" if len(files) == 1 else "the results files of these runs"
        dropped = f", and {many(subjects, 'subject')} altogether" if subjects else ""
        return (
            f"Shown is the worst cell of each subject and precision; {many(cells, 'other cell')} "
            f"{'is' if cells == 1 else 'are'} left out{dropped}. Their numbers are in {where}, under “series”."
        )

    def _error(self, _subject: str, _task: str, places: list[CheckCell]) -> Iterator[tuple[str, Figure]]:
        """Errors in roundoffs and, where a module is judged by it, against its own rounded run: these share no axis."""
        drawn = [
            (title, unit, *self._judged(places, name))
            for name, title, unit in (
                ("error", "Error by layer and module class", "unit roundoffs"),
                ("composed", "Error of composed modules", "times the error of their rounded run"),
            )
        ]
        nearest = max((found for *_, found in drawn), key=lambda pair: pair[0])
        word = "Beyond its budget" if nearest[0] > 1 else "Nearest its budget"
        summary = f"{word}: {nearest[1]}" if nearest[1] else ""
        for title, unit, curves, told, _ in drawn:
            if told.of:
                yield summary, over_modules("modules", title, unit, curves, told)

    def _judged(self, places: list[CheckCell], name: str) -> tuple[list[PlotLine], Beside, tuple[float, str]]:
        """The curves of one series over modules, and the point nearest its limit."""
        curves: list[PlotLine] = []
        told = Beside(heads=("class", "layer"))
        nearest = (-1.0, "")
        for place in places:
            label = self._label(place)
            points: dict[int | str, float] = {}
            limits: dict[int | str, float] = {}
            for series in _named(place, name):
                for at, module in enumerate(str(item) for item in series.at):
                    role = series.groups[at] if series.groups else "other"
                    told.of.setdefault(module, (role, layer_of(module)))
                    points[module] = value = series.values[at]
                    limit = series.limits[at] if series.limits else None
                    if limit is not None:
                        limits[module] = limit
                        text = f"{module} ({role}) {number(value)} of {number(limit)} in {label}"
                        nearest = max(nearest, (share_of(value, limit), text), key=lambda pair: pair[0])
            curves.append(PlotLine(label=label, points=points, limits=limits))
        return curves, told, nearest

    def _bits(self, _subject: str, _task: str, places: list[CheckCell]) -> Iterator[tuple[str, Figure]]:
        curves: list[PlotLine] = []
        told = Beside(heads=("class", "layer"))
        least = (math.inf, "")
        for place in places:
            points: dict[int | str, float] = {}
            for series in _named(place, "bits"):
                for at, name in enumerate(series.at):
                    role = series.groups[at] if series.groups else "other"
                    told.of.setdefault(str(name), (role, layer_of(str(name))))
                    points[str(name)] = value = series.values[at]
                    text = f"{number(value)} bits at {name} in {self._label(place)}"
                    least = min(least, (-math.inf if math.isnan(value) else value, text), key=lambda pair: pair[0])
            curves.append(PlotLine(label=self._label(place), points=points))
        if told.of:
            yield f"Least: {least[1]}", over_modules("bits", "Headroom by layer", "bits", curves, told)

    def _curves(self, _subject: str, _task: str, places: list[CheckCell]) -> Iterator[tuple[str, Figure]]:
        """What failed is drawn next to the same cell in a version where it did not."""
        failed = [place for place in places if place.result.finding is not None]
        first = failed[0].result.finding if failed else None
        summary = f"{self._label(failed[0])}: {first.title}" if first is not None else "finite at every step"
        places = [*places, *(good for place in failed if (good := self._good(place)) is not None)]
        losses = [self._curve(place, "loss") for place in places]
        norms = [self._curve(place, "gradient-norm") for place in places]
        scales = [self._curve(place, "loss-scale") for place in places]
        clipped = [
            self._curve(other, "clipped-norm", suffix=", clipped") for other in self._beside(places, "train.clip")
        ]
        for figure in (
            over_steps("Loss", "nats", losses),
            over_steps("Gradient norm", "", [*norms, *clipped]),
            over_steps("Loss scale", "", scales),
        ):
            if figure is not None:
                yield summary, figure

    def _good(self, place: CheckCell) -> CheckCell | None:
        """The same cell in the nearest version of the same matrix where the check passed, an older one first."""
        found = [
            other
            for other in self._by_check.get(place.result.check, [])
            if other.result.cell == place.result.cell
            and other.result.status == "passed"
            and other.source.matrix is not None
            and other.source.matrix == place.source.matrix
        ]
        at = place.source.at
        older = [other for other in found if other.source.at < at]
        return older[-1] if older else next(iter(found), None)

    def _beside(self, places: Sequence[CheckCell], check: str) -> Iterator[CheckCell]:
        """What another check said of the same cells in the same runs."""
        wanted = {(id(place.source), place.result.cell) for place in places}
        for place in self._by_check.get(check, []):
            if (id(place.source), place.result.cell) in wanted:
                yield place

    def _curve(self, place: CheckCell, name: str, suffix: str = "") -> PlotLine:
        points: dict[int | str, float] = {}
        for series in _named(place, name):
            points |= dict(zip(series.at, series.values, strict=True))
        finding = place.result.finding
        mark = finding.step if finding is not None else None
        if mark is None:
            mark = next((int(at) for at, value in points.items() if not math.isfinite(value)), None)
        return PlotLine(label=f"{self._label(place)}{suffix}", points=points, mark=mark, marked="not finite")


def _named(place: CheckCell, *names: str) -> Iterator[Series]:
    return (series for series in place.result.series if series.name in names)


def layer_of(module: str) -> str:
    """The number of the layer that a module is in, empty for one outside all layers."""
    found = _LAYER.search(module)
    return found.group(1) if found else ""


def _excess(place: CheckCell) -> float:
    """The largest share of a budget."""
    shares = [
        share_of(value, limit)
        for series in _named(place, "error", "composed")
        for value, limit in zip(series.values, series.limits, strict=False)
        if limit is not None
    ]
    return max(shares, default=0.0)


def _lack(place: CheckCell) -> float:
    """The fewest bits, the worst largest."""
    bits = [math.inf if math.isnan(value) else -value for series in _named(place, "bits") for value in series.values]
    return max(bits, default=-math.inf)


def _divergence(place: CheckCell) -> float:
    """A failure is worst, the earlier the worse; then the largest last loss."""
    finding = place.result.finding
    if finding is not None:
        return 1e9 - (finding.step or 0)
    losses = [series.values[-1] for series in _named(place, "loss") if series.values]
    return max((1e6 if not math.isfinite(value) else min(value, 1e5) for value in losses), default=-1.0)
