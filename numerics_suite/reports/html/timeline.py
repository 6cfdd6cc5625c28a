"""A matrix as a timeline: versions by subject and precision, and what changed from one to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from numerics_suite.core.text import listed
from numerics_suite.judgement.classify import KINDS
from numerics_suite.reports.view.formats import slug
from numerics_suite.reports.view.version_ranges import sequences

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numerics_suite.core.versions import Change, MatrixCell
    from numerics_suite.reports.documents import Matrix
    from numerics_suite.reports.view.places import Source

BASELINE = "baseline"
QUIET = ("identical", "")
"""Kinds that say nothing new."""

LETTERS = {
    "missing": "m",
    "changed": "Δ",
    "worse": "w",
    "contract": "c",
    "new": "n",
    "better": "b",
    "rounding": "r",
    "identical": "=",
}
"""The letter of each kind of change, worst first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A column: one environment.

    Attributes:
        name: its version of the package that changes.
        anchor: unique in the page.
        kind: the worst change against the version before, empty where that is not known.
    """

    name: str
    anchor: str
    status: str
    kind: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One subject and precision in one version: the same fields as a version's, empty status where it was not asked."""

    status: str
    kind: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineRow:
    """A row: one subject at one precision."""

    subject: str
    task: str
    precision: str
    moments: tuple[Moment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """Equal changes of one version, over subjects and precisions."""

    version: str
    anchor: str
    against: str
    kind: str
    module: str
    cells: str
    details: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Track:
    """Versions of one package, oldest first, with everything else the same.

    Attributes:
        within: what the others are, empty where they are the same in the whole matrix.
        held: the other packages of the first cell, for the caption.
        changes: what changed, version by version.
        reasons: cells that could not be asked, and why.
    """

    package: str
    within: str
    held: str
    versions: tuple[Version, ...]
    lines: tuple[TimelineRow, ...]
    changes: tuple[Told, ...]
    reasons: tuple[tuple[str, str], ...]

    @property
    def changed(self) -> str:
        """Versions that changed something against the one before, with the kinds: `5.4.0 contract; 5.23.0 rounding`."""
        kinds: dict[str, dict[str, None]] = {}
        for told in self.changes:
            if told.against != BASELINE:
                kinds.setdefault(told.version, {})[told.kind] = None
        return "; ".join(f"{version} {' and '.join(found)}" for version, found in kinds.items())


def tracks_of(index: int, matrix: Matrix, sources: Sequence[Source]) -> tuple[Track, ...]:
    """The timelines of one matrix."""
    tracks = []
    for at, (package, within, members) in enumerate(sequences(sources)):
        cells = [matrix.result.cells[source.at] for source in members]
        tracks.append(_track(f"v{index}-{at}", package, within, cells))
    return tuple(tracks)


def _track(prefix: str, package: str, within: str, cells: Sequence[MatrixCell]) -> Track:
    names = [str(getattr(cell.held, package) or "?") for cell in cells]
    anchors = [f"{prefix}-{at}-{slug(name)}" for at, name in enumerate(names)]
    keys = dict.fromkeys((row.subject, row.task, row.precision) for cell in cells for row in cell.rows)
    lines = tuple(
        TimelineRow(subject=subject, task=task, precision=precision, moments=tuple(_moments(cells, names, key)))
        for key in keys
        for subject, task, precision in [key]
    )
    others = [name for name in ("transformers", "torch", "python") if name != package]
    held = ", ".join(f"{name} {version}" for name in others if (version := getattr(cells[0].held, name)))
    return Track(
        package=package,
        within=within,
        held=held,
        versions=tuple(_version(*item) for item in zip(names, anchors, cells, strict=True)),
        lines=lines,
        changes=tuple(
            told for name, anchor, cell in zip(names, anchors, cells, strict=True) for told in _told(name, anchor, cell)
        ),
        reasons=tuple(reason for name, cell in zip(names, cells, strict=True) for reason in _reasons(name, cell)),
    )


def _version(name: str, anchor: str, cell: MatrixCell) -> Version:
    kind = _kind([change for change in cell.changes if change.against != BASELINE])
    checks = list(dict.fromkeys(failure.check for failure in cell.failures))
    title = f"{name}: {cell.status}"
    title += f"; {listed(checks, 4)}" if checks else ""
    title += f"; {kind} against the version before" if kind not in QUIET else ""
    title += f"; {cell.reason}" if cell.reason else ""
    return Version(name=name, anchor=anchor, status=cell.status, kind=kind, title=title)


def _kind(changes: Sequence[Change]) -> str:
    kinds = {change.kind for change in changes}
    return next((kind for kind in KINDS if kind in kinds), "")


def _moments(cells: Sequence[MatrixCell], names: Sequence[str], key: tuple[str, str, str]) -> Iterator[Moment]:
    """A version that ran, recorded a baseline and names no change gives the bits of the one before it."""
    before = False
    for name, cell in zip(names, cells, strict=True):
        ran = any((row.subject, row.task, row.precision) == key for row in cell.rows)
        if not ran:
            reason = cell.unsupported.get(key[0]) or (cell.reason or "")
            status = "unsupported" if key[0] in cell.unsupported else "error" if cell.status == "error" else ""
            yield Moment(
                status=status, kind="", title=f"{name}: {status or 'not asked'}{f', {reason}' if reason else ''}"
            )
            continue
        status, failures, every = cell.of(*key)
        changes = [change for change in every if change.against != BASELINE]
        kind = _kind(changes) or ("identical" if before and cell.baseline is not None else "")
        parts = [f"{name}: {status}"]
        parts += [listed(list(dict.fromkeys(item.check for item in failures)), 4)] if failures else []
        parts += [f"{change.kind} against {change.against}" for change in changes]
        parts += ["identical to the version before"] if kind == "identical" else []
        yield Moment(status=status, kind=kind, title="; ".join(dict.fromkeys(parts)))
        before = cell.baseline is not None


def _told(name: str, anchor: str, cell: MatrixCell) -> Iterator[Told]:
    groups: dict[tuple[object, ...], list[Change]] = {}
    for change in cell.changes:
        groups.setdefault((change.against, change.kind, change.module, change.details), []).append(change)
    for members in groups.values():
        first = members[0]
        by_subject: dict[str, list[str]] = {}
        for change in members:
            by_subject.setdefault(f"{change.subject} ({change.task})", []).append(change.precision)
        yield Told(
            version=name,
            anchor=anchor,
            against=first.against,
            kind=first.kind,
            module=first.module or "",
            cells="; ".join(f"{subject} {', '.join(dict.fromkeys(told))}" for subject, told in by_subject.items()),
            details=first.details,
        )


def _reasons(name: str, cell: MatrixCell) -> Iterator[tuple[str, str]]:
    if cell.reason and cell.status in {"error", "unsupported"}:
        yield name, cell.reason
    for subject, reason in cell.unsupported.items():
        yield name, f"{subject}: {reason}"
