"""What changed: each cell's recorded baselines against those of the version before it, and against the user's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numerics_suite.baselines.store import Baselines, load
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.versions import Change, MatrixCell, Versions

if TYPE_CHECKING:
    from pathlib import Path

BASELINE = "baseline"
"""What `against` says of the user's own baselines."""


def with_changes(cells: Sequence[MatrixCell], baseline: Path | None) -> tuple[tuple[MatrixCell, ...], list[str]]:
    """The cells, each with what changed, and notes for a person.

    A cell is compared, subject by subject, with the newest older one that has the subject, along each of the three axes:
    the same torch and Python, the same transformers and Python, the same transformers and torch.
    """
    notes: list[str] = []
    own = load(baseline) if baseline is not None else None
    loaded: dict[Path, Baselines] = {}

    def baselines(cell: MatrixCell) -> Baselines | None:
        if cell.baseline is None:
            return None
        if cell.baseline not in loaded:
            try:
                loaded[cell.baseline] = load(cell.baseline)
            except BadInputError as error:
                notes.append(str(error))
                loaded[cell.baseline] = Baselines(cell.baseline, ())
        return loaded[cell.baseline]

    told = []
    for index, cell in enumerate(cells):
        mine = baselines(cell)
        changes: list[Change] = []
        for subject in dict.fromkeys(key.subject for key in mine or ()):
            assert mine is not None
            part = _of(mine, subject)
            compared_with: set[str] = set()
            for axis, against, other in _earlier(cell, cells[:index]):
                theirs = baselines(other) if axis not in compared_with else None
                before = _of(theirs, subject) if theirs is not None else None
                if before:
                    compared_with.add(axis)
                    changes += compared(against, before, part)
        if own is not None and mine is not None:
            changes += compared(BASELINE, _asked(own, mine), mine)
        told.append(cell.with_changes(_once(changes)))
    return tuple(told), notes


def _of(baselines: Baselines, subject: str) -> Baselines:
    return Baselines(baselines.folder, [item for key, item in baselines.items() if key.subject == subject])


def _asked(own: Baselines, mine: Baselines) -> Baselines:
    """The user's baselines of the subjects at hand: those of others were not asked for."""
    subjects = {(key.subject, key.task) for key in mine}
    return Baselines(own.folder, [item for key, item in own.items() if (key.subject, key.task) in subjects])


def _earlier(cell: MatrixCell, before: Sequence[MatrixCell]) -> Iterator[tuple[str, str, MatrixCell]]:
    """Older cells that differ in one axis, nearest first; with the axis and what `against` says."""
    for other in reversed(before):
        axis = _axis(cell.held, other.held)
        if axis == "transformers":
            yield axis, str(other.held.transformers), other
        elif axis is not None:
            yield axis, f"{axis} {other.held.named.get(axis)}", other


def _axis(one: Versions, other: Versions) -> str | None:
    """The only axis in which two environments differ, None where there are several or none."""
    ours, theirs = one.named, other.named
    different = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return different[0] if len(different) == 1 else None


def _once(changes: Sequence[Change]) -> tuple[Change, ...]:
    return tuple(dict.fromkeys(changes))


def compared(against: str, old: Baselines, new: Baselines) -> Iterator[Change]:
    """Everything that is not identical."""
    from numerics_suite.judgement.classify import compare_baselines

    for comparison in compare_baselines(old, new):
        judged, cell = comparison.judged, comparison.cell
        for place, kind in enumerate(judged.all_kinds):
            if kind != "identical":
                yield Change(
                    against=against,
                    subject=cell.subject,
                    task=cell.task,
                    precision=cell.precision,
                    attn=cell.attn,
                    kind=kind,
                    module=judged.module if place == 0 else None,
                    details=_details(kind, judged.details),
                )


def _details(kind: str, details: Mapping[str, Any]) -> tuple[str, ...]:
    """What there is to say about one kind."""
    if kind == "rounding":
        return tuple(f"bits of {part}" for part in details.get("bits_differ", ()))
    if kind == "contract":
        return tuple(map(str, details.get("contract", ()))) or tuple(details.get("why", ()))
    if kind == "missing":
        return tuple(map(str, details.get("missing", ()))) or tuple(details.get("why", ()))
    return tuple(details.get("why", ()))
