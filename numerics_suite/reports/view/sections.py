"""The rest of the page: rehearsals, what was skipped or could not be carried out, environments and settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numerics_suite.core.text import listed
from numerics_suite.reports.view.curves import Figure, PlotLine, over_steps
from numerics_suite.reports.view.formats import STATUSES, number

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numerics_suite.core.rehearsal import Advice, Rehearsal, RehearsedRun
    from numerics_suite.reports.documents import Documents
    from numerics_suite.reports.view.places import CheckCell, Places, Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Results with one reason: how many, which checks, and where."""

    reason: str
    count: int
    checks: str
    where: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """One rehearsal.

    Attributes:
        rows: for each precision what it came to.
    """

    title: str
    about: str
    figures: tuple[Figure, ...]
    rows: tuple[tuple[str, ...], ...]
    recipe: tuple[Advice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One option as used, and where it came from."""

    name: str
    value: str
    origin: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What was run, on what, by what.

    Attributes:
        runs: for each source its label, verdict, time and counts.
        differing: names, and for each source those that differ.
        settings: of the first run; the others' where they differ.
        other_settings: names of options that are not the same in all runs.
    """

    subjects: tuple[tuple[str, ...], ...]
    runs: tuple[tuple[str, ...], ...]
    packages: tuple[tuple[str, str], ...]
    differing: tuple[tuple[str, ...], ...]
    differing_names: tuple[str, ...]
    settings: tuple[Setting, ...]
    other_settings: str


def reasons_of(places: Places, status: str) -> tuple[Reason, ...]:
    """Results of one status by their reason, the most frequent first."""
    groups: dict[str, list[CheckCell]] = {}
    for place in places.all:
        if place.result.status == status:
            groups.setdefault(place.result.reason or "no reason given", []).append(place)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return tuple(_reason(reason, members) for reason, members in ordered)


def _reason(reason: str, members: Sequence[CheckCell]) -> Reason:
    checks = dict.fromkeys(place.result.check for place in members)
    subjects = dict.fromkeys(place.result.cell.subject for place in members)
    precisions = dict.fromkeys(place.result.cell.precision for place in members)
    return Reason(
        reason=reason,
        count=len(members),
        checks=listed(list(checks), 6),
        where=f"{listed(list(subjects), 4)} in {listed(list(precisions), 6)}",
    )


def rehearsed(documents: Documents) -> tuple[Rehearsed, ...]:
    """Every rehearsal of the report."""
    return tuple(_rehearsed(item) for run in documents.every_run for item in run.result.rehearsals)


def _rehearsed(item: Rehearsal) -> Rehearsed:
    losses, clipped, norms, scales = [], [], [], []
    for run in item.runs:
        losses.append(_curve(run.precision, run.losses, run.stopped))
        clipped.append(_curve(f"{run.precision}, clipped", run.clipped_losses, run.stopped_clipped))
        norms.append(_curve(run.precision, run.gradient_norms, ""))
        scales.append(_curve(run.precision, run.scales, ""))
    chance = "" if item.chance is None else f"A classifier that knows nothing has a loss of {number(item.chance)}."
    figures = (
        over_steps("Loss", "nats", [*losses, *clipped], chance),
        over_steps("Gradient norm", "", norms),
        over_steps("Loss scale", "", scales),
    )
    return Rehearsed(
        title=f"{item.subject} ({item.task})",
        about=f"{item.batch}: {item.steps} steps of {item.optimizer} at lr {item.lr:.2g}, {item.attn} on {item.device}",
        figures=tuple(figure for figure in figures if figure is not None),
        rows=tuple(_rehearsed_row(run) for run in item.runs),
        recipe=item.recipe,
    )


def _curve(label: str, values: Sequence[float], stopped: str) -> PlotLine:
    mark = len(values) if stopped and values else None
    return PlotLine(label=label, points=dict(enumerate(values, start=1)), mark=mark, marked=stopped)


def _rehearsed_row(run: RehearsedRun) -> tuple[str, ...]:
    stable = "none found"
    if run.largest_stable_lr is not None:
        stable = f"{'at least ' if run.at_least else ''}{run.largest_stable_lr:.2g}"
    return (
        run.precision,
        number(run.largest_logit),
        f"{number(run.losses[0])} to {number(run.losses[-1])}" if run.losses else "",
        f"{number(run.scales[-1])}, {run.skipped} skipped" if run.scales else "",
        stable,
        run.stopped or "finite at every step",
    )


def surroundings_of(documents: Documents, places: Places) -> Surroundings:
    """What was run, on what, by what."""
    runs = [source for source in places.sources if source.run is not None]
    held = [(source.label or "this run", _packages(source)) for source in runs]
    names = list(dict.fromkeys(name for _, packages in held for name in packages))
    shared = [name for name in names if len({packages.get(name) for _, packages in held}) == 1]
    differing = [name for name in names if name not in shared]
    settings = [run.result.settings for run in documents.every_run]
    return Surroundings(
        subjects=tuple(dict.fromkeys(_subjects(documents))),
        runs=tuple(_run(source) for source in places.sources),
        packages=tuple((name, held[0][1][name]) for name in shared),
        differing=tuple((label, *(packages.get(name, "") for name in differing)) for label, packages in held)
        if differing
        else (),
        differing_names=tuple(differing),
        settings=tuple(_settings(settings[0])) if settings else (),
        other_settings=listed(_other(settings), 20),
    )


def _packages(source: Source) -> dict[str, str]:
    assert source.run is not None
    environment = source.run.result.environment
    facts = {name: str(environment[name]) for name in ("python", "platform", "device") if name in environment}
    return facts | {str(name): str(version) for name, version in environment.get("packages", {}).items()}


def _subjects(documents: Documents) -> Iterator[tuple[str, ...]]:
    for run in documents.every_run:
        for subject in run.result.subjects:
            facts = (subject.source, subject.family, subject.model_class, subject.task, subject.parameters)
            rest = (subject.stored_dtype, subject.revision, subject.digest)
            yield (subject.id, *("" if fact is None else number(fact) for fact in (*facts, *rest)))


def _run(source: Source) -> tuple[str, ...]:
    """Label, verdict, when, seconds, then a count for each status, worst first."""
    counted = Counter(result.status for result in source.results)
    counts = tuple(f"{counted[status]:,}" for status in STATUSES)
    if source.run is None:
        status = source.cell.status if source.cell is not None else ""
        return (source.label or "this run", status, "", "", *counts)
    result = source.run.result
    return (source.label or "this run", result.verdict, result.started_at, f"{result.duration_s:.1f} s", *counts)


def _settings(settings: Mapping[str, Any]) -> Iterator[Setting]:
    origins = settings.get("origins", {})
    for name, value in settings.items():
        if name != "origins":
            yield Setting(name=name.replace("_", "-"), value=_text(value), origin=str(origins.get(name, "default")))


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={item}" for name, item in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return ", ".join(_text(item) for item in value) or "none"
    return str(value)


def _other(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for one in settings for name in one if name != "origins")
    return [name.replace("_", "-") for name in names if any(one.get(name) != settings[0].get(name) for one in settings)]
