"""Which tensors of one version are parts of which of another: experts that were fused, projections that became one.

The sum of the squares of a tensor is the sum over its parts, however these were concatenated, stacked, interleaved or
transposed. So parts are known by two numbers that every baseline holds, the count of elements and their root mean square:
the counts add up exactly, and the squares to :data:`numerics_suite.core.exact.AGREED`, which other values meet by chance
once in 10^10. Which part went where does not show in them; a part in a wrong place is another function, and the answers
show that.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from numerics_suite.core.exact import AGREED

if TYPE_CHECKING:
    from collections.abc import Collection

    from numerics_suite.baselines.batch_match import Matching
    from numerics_suite.baselines.records import CellBaseline, Sketch

JOINED: Final = 4
"""Most tensors, or stacks of them, that are concatenated: query, key, value and a gate."""

TOGETHER: Final = 12
"""Neighbouring tensors of which some may be parts of one; a module with more of them is no projection split in parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A tensor, a stack of them or several: how many elements, and the sum of their squares."""

    names: tuple[str, ...]
    count: int
    squares: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fusion:
    """The same values under other names: one side has one, the other its parts."""

    old: tuple[str, ...]
    new: tuple[str, ...]

    def told(self) -> str:
        """`8 tensors model.layers.0.mlp.experts.0.w1.weight, … are model.layers.0.mlp.experts.gate_up_proj`."""
        old, new = (
            names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, …)" for names in (self.old, self.new)
        )
        return f"{old} ↔ {new}"


def fused_parameters(old: CellBaseline, new: CellBaseline, parameters: Matching) -> tuple[Fusion, ...]:
    """The parameters that have no partner of their own, and are parts of one or made of several.

    By their own values where both baselines hold them, else by their gradients.
    """
    gone, came = {*parameters.vanished, *parameters.moved}, set(parameters.appeared)
    if old.tensors and new.tensors:
        ours, theirs = ([(record.name, record.values) for record in side.tensors] for side in (old, new))
    else:
        ours, theirs = ([(record.name, record.gradient) for record in side.gradients] for side in (old, new))
    return fusions(_parts(ours, gone), _parts(theirs, came))


def _parts(tensors: Sequence[tuple[str, Sketch]], wanted: Collection[str]) -> list[Part]:
    return [part_of(name, values) for name, values in tensors if name in wanted]


def part_of(name: str, values: Sketch) -> Part:
    """A tensor as a part."""
    return Part(names=(name,), count=values.count, squares=values.count * values.rms**2)


def together(names: Sequence[str], values: Sequence[Sketch]) -> Part:
    """Several tensors as one part."""
    parts = [part_of(name, each) for name, each in zip(names, values, strict=True)]
    return _sum(parts)


def fusions(old: Sequence[Part], new: Sequence[Part]) -> tuple[Fusion, ...]:
    """Every tensor of one side whose values are those of several of the other."""
    found = [Fusion(old=parts, new=whole) for parts, whole in _wholes(old, new)]
    used = {name for fusion in found for name in (*fusion.old, *fusion.new)}
    rest_old, rest_new = ([part for part in side if part.names[0] not in used] for side in (old, new))
    return (*found, *(Fusion(old=whole, new=parts) for parts, whole in _wholes(rest_new, rest_old)))


def _wholes(parts: Sequence[Part], wholes: Sequence[Part]) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Names of the parts, and of the tensor that is made of them."""
    by_count: dict[int, list[Part]] = {}
    for made in _made_of(parts) if wholes else ():
        by_count.setdefault(made.count, []).append(made)
    used: set[str] = set()
    for whole in wholes:
        for made in by_count.get(whole.count, ()):
            if used.isdisjoint(made.names) and abs(made.squares - whole.squares) <= AGREED * whole.squares:
                used.update(made.names)
                yield made.names, whole.names
                break


def _made_of(parts: Sequence[Part]) -> Iterator[Part]:
    """What several tensors could have become: neighbours joined, numbered ones stacked, stacks joined."""
    beside: dict[str, list[Part]] = {}
    stacks: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        (name,) = part.names
        beside.setdefault(".".join(name.split(".")[:-2]), []).append(part)
        pieces = name.split(".")
        number = max((place for place, piece in enumerate(pieces) if piece.isdigit()), default=None)
        if number is not None:
            key = ".".join(pieces[:number]), ".".join(pieces[number + 1 :])
            stacks.setdefault(key, []).append(part)
    containers: dict[str, list[Part]] = {}
    for (container, _), members in stacks.items():
        if len(members) > 1 and len({member.count for member in members}) == 1:
            containers.setdefault(container, []).append(_sum(members))
    for group in beside.values():
        yield from _joined(group, least=2)
    for group in containers.values():
        yield from _joined(group, least=1)


def _joined(group: Sequence[Part], *, least: int) -> Iterator[Part]:
    if len(group) <= TOGETHER:
        for size in range(least, JOINED + 1):
            yield from map(_sum, itertools.combinations(group, size))


def _sum(parts: Sequence[Part]) -> Part:
    return Part(
        names=tuple(name for part in parts for name in part.names),
        count=sum(part.count for part in parts),
        squares=math.fsum(part.squares for part in parts),
    )
