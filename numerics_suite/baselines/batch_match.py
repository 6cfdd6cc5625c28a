"""Which module of one version is which of another: by name, and where names changed by order, shape and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from numerics_suite.core.exact import AGREED
from numerics_suite.core.numbers import nan_last

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from numerics_suite.baselines.records import GradientRecord, ModuleRecord, Sketch

CANCELLED: Final = 1e-12
"""A gradient this small beside the largest is what is left of terms that cancel: it is compared on the largest one's scale."""

MOST_PAIRS: Final = 4_000_000
"""Pairs that are weighed; beyond, alike ones are matched in their order."""

TOLD: Final = 3
"""Renamed pairs that a line names before it says how many more there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What is matched: a module or a parameter with its gradient."""

    name: str
    kind: str
    sketch: Sketch | None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of what it gives."""
        return None if self.sketch is None else self.sketch.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """Indices into the old and the new sequence.

    Attributes:
        pairs: in the order of the new.
        renamed: names of the pairs whose names differ.
        moved: old ones that have no partner while another of the new gives the same.
        vanished: old ones of which nothing is left.
    """

    pairs: tuple[tuple[int, int], ...]
    renamed: tuple[tuple[str, str], ...] = ()
    moved: tuple[str, ...] = ()
    vanished: tuple[str, ...] = ()
    appeared: tuple[str, ...] = ()

    def told(self) -> str:
        """`matched by order and shape: model.norm ↔ transformer.final_layernorm and 4 more`; empty where names agree."""
        if not self.renamed:
            return ""
        first = ", ".join(f"{old} ↔ {new}" for old, new in self.renamed[:TOLD])
        more = f" and {len(self.renamed) - TOLD} more" if len(self.renamed) > TOLD else ""
        return f"matched by order and shape: {first}{more}"


def modules_matched(old: Sequence[ModuleRecord], new: Sequence[ModuleRecord]) -> Matching:
    """The modules of two versions, each in the order in which they first return."""
    return matched(
        [Item(name=module.name, kind=module.kind, sketch=module.gave) for module in old],
        [Item(name=module.name, kind=module.kind, sketch=module.gave) for module in new],
    )


def gradients_matched(old: Sequence[GradientRecord], new: Sequence[GradientRecord]) -> Matching:
    """The parameters of two versions by their gradients; a parameter's kind is the last part of its name."""

    def items(records: Sequence[GradientRecord]) -> list[Item]:
        return [Item(name=r.name, kind=r.name.rpartition(".")[2], sketch=r.gradient) for r in records]

    return matched(items(old), items(new))


def matched(old: Sequence[Item], new: Sequence[Item]) -> Matching:
    """Match by name first, then what is left by the best common order."""
    place = {item.name: index for index, item in enumerate(new)}
    pairs = [(index, place[item.name]) for index, item in enumerate(old) if item.name in place]
    taken_old, taken_new = {i for i, _ in pairs}, {j for _, j in pairs}
    left_old = [index for index in range(len(old)) if index not in taken_old]
    left_new = [index for index in range(len(new)) if index not in taken_new]
    aligned = _aligned([old[i] for i in left_old], [new[j] for j in left_new])
    others = [(left_old[i], left_new[j]) for i, j in aligned]
    others += _below_renamed(old, new, others, (left_old, left_new))
    partner_old, partner_new = {i for i, _ in others}, {j for _, j in others}
    alone = [old[index] for index in left_old if index not in partner_old]
    gone = [item for item in alone if not _given_elsewhere(item, new)]
    return Matching(
        pairs=tuple(sorted([*pairs, *others], key=lambda pair: pair[1])),
        renamed=tuple((old[i].name, new[j].name) for i, j in others),
        moved=tuple(item.name for item in alone if item not in gone),
        vanished=tuple(item.name for item in gone),
        appeared=tuple(new[index].name for index in left_new if index not in partner_new),
    )


def _below_renamed(
    old: Sequence[Item], new: Sequence[Item], pairs: Sequence[tuple[int, int]], left: tuple[list[int], list[int]]
) -> list[tuple[int, int]]:
    """What has the same name and shape within a module that was renamed, whatever it is and gives."""
    taken_old, taken_new = {i for i, _ in pairs}, {j for _, j in pairs}
    names = {old[i].name: new[j].name for i, j in pairs}
    place = {new[j].name: j for j in left[1] if j not in taken_new}
    found = []
    for i in left[0]:
        outer, _, name = old[i].name.rpartition(".")
        j = place.get(f"{names[outer]}.{name}") if i not in taken_old and outer in names else None
        if j is not None and old[i].shape == new[j].shape:
            found.append((i, j))
    return found


def _given_elsewhere(item: Item, new: Sequence[Item]) -> bool:
    """Whether nothing is lost with it: it gave nothing that was watched, or a module of the new version gives the same."""
    if item.sketch is None:
        return True
    return any(sketch_deviation(item.sketch, other.sketch) <= AGREED for other in new if other.shape == item.shape)


def _aligned(old: Sequence[Item], new: Sequence[Item]) -> list[tuple[int, int]]:
    if not old or not new:
        return []
    if len(old) * len(new) > MOST_PAIRS:
        return _in_order(old, new)
    return _best_order(_weights(old, new))


def _in_order(old: Sequence[Item], new: Sequence[Item]) -> list[tuple[int, int]]:
    """Alike ones (kind, shape, last part of the name) one after the other."""
    queues: dict[tuple[object, ...], list[int]] = {}
    for index in reversed(range(len(new))):
        queues.setdefault(_likeness(new[index]), []).append(index)
    return [(index, queue.pop()) for index, item in enumerate(old) if (queue := queues.get(_likeness(item)))]


def _likeness(item: Item) -> tuple[object, ...]:
    return item.kind, item.shape, item.name.rpartition(".")[2]


def _weights(old: Sequence[Item], new: Sequence[Item]) -> NDArray[np.float64]:
    """`[old, new]`: how much speaks for each pair; 0 forbids it. Shapes agree, and the kind or the values do."""

    def same(values_old: Sequence[object], values_new: Sequence[object]) -> NDArray[np.bool_]:
        numbers: dict[object, int] = {}
        left = np.array([numbers.setdefault(value, len(numbers)) for value in values_old])
        right = np.array([numbers.setdefault(value, len(numbers)) for value in values_new])
        return np.asarray(left[:, None] == right[None, :])

    shape = same([item.shape for item in old], [item.shape for item in new])
    kind = same([item.kind for item in old], [item.kind for item in new])
    ending = same([_likeness(item)[2] for item in old], [_likeness(item)[2] for item in new])
    value = _values_agree(old, new)
    weight = 1.0 + 1.0 * kind + 0.5 * ending + 2.0 * value
    return np.where(shape & (kind | value), weight, 0.0)


def _values_agree(old: Sequence[Item], new: Sequence[Item]) -> NDArray[np.bool_]:
    """`[old, new]`: whether what both give is the same; compared row by row of the old, all of the new at once."""
    agree = np.zeros((len(old), len(new)), dtype=np.bool_)
    columns: dict[object, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}
    for size in {(item.shape, np.size(item.sketch.projections)) for item in new if item.sketch is not None}:
        members = [
            (index, item.sketch)
            for index, item in enumerate(new)
            if item.sketch is not None and (item.shape, np.size(item.sketch.projections)) == size
        ]
        columns[size] = np.array([index for index, _ in members]), np.stack([_vector(sketch) for _, sketch in members])
    for row, item in enumerate(old):
        if item.sketch is None:
            continue
        group = columns.get((item.shape, np.size(item.sketch.projections)))
        if group is not None:
            with np.errstate(invalid="ignore"):
                apart = np.abs(group[1] - _vector(item.sketch)).max(axis=1)
            agree[row, group[0]] = apart <= AGREED * item.sketch.rms
    return agree


def _vector(sketch: Sketch) -> NDArray[np.float64]:
    return np.append(sketch.projections, sketch.rms)


def _best_order(weight: NDArray[np.float64]) -> list[tuple[int, int]]:
    """The pairs of the heaviest common subsequence."""
    rows, columns = weight.shape
    best = np.zeros((rows + 1, columns + 1))
    for i in range(1, rows + 1):
        taken = np.where(weight[i - 1] > 0, best[i - 1, :-1] + weight[i - 1], 0.0)
        best[i, 1:] = np.maximum.accumulate(np.maximum(taken, best[i - 1, 1:]))
    pairs = []
    i, j = rows, columns
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


def sketch_deviation(old: Sketch | None, new: Sketch | None, scale: float | None = None) -> float:
    """`max|a-b| / rms(old)` of what two sketches hold; infinite for other shapes, NaN where only one has a NaN.

    Args:
        old: the reference.
        new: the other.
        scale: instead of the reference's root mean square.
    """
    if old is None or new is None:
        return 0.0 if old is new else float("inf")
    if old.shape != new.shape or np.shape(old.projections) != np.shape(new.projections):
        return float("inf")
    return deviation(_vector(old), _vector(new), old.rms if scale is None else scale)


def deviation(old: NDArray[np.float64], new: NDArray[np.float64], scale: float) -> float:
    """`max|a-b| / scale`, NaN equal to NaN and infinities to themselves; a reference of zero wants zero.

    Args:
        old: the reference.
        new: of any shape.
        scale: root mean square of the reference.

    Returns:
        Infinite where shapes differ or only one is zero, NaN where only one has a NaN.
    """
    if np.shape(old) != np.shape(new):
        return float("inf")
    with np.errstate(invalid="ignore", divide="ignore"):
        same = (old == new) | (np.isnan(old) & np.isnan(new))
        if bool(np.all(same)):
            return 0.0
        largest = float(np.max(np.where(same, 0.0, np.abs(new - old))))
    if largest != largest or scale != scale:
        return float("nan")
    if scale == 0 or largest == float("inf"):
        return float("inf")
    return largest / scale if scale != float("inf") else float("nan")


def worst(values: Sequence[float]) -> float:
    """The largest; NaN is the worst there is."""
    return max(values, key=nan_last, default=0.0)
