"""What callers rely on, entry by entry: kept, changed, removed or added."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from numerics_suite.baselines.sampling_error import two_draws

CLOSE: Final = 1e-10
"""Relative difference of two numbers that are computed in float64 from the same values."""

STATISTICS: Final = frozenset({"count", "mean", "std"})
"""Keys of an object that describes a random draw: another release may draw other numbers of the same distribution."""

DEVIATIONS: Final = 5.0
"""Standard deviations that the means of two draws may be apart: exceeded by chance once in a million."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractChange:
    """One entry.

    Attributes:
        entry: dotted: `outputs.logits`.
        how: an addition takes nothing from anybody.
        old: as text, empty for an addition.
        new: as text, empty for a removal.
    """

    entry: str
    how: Literal["changed", "removed", "added"]
    old: str = ""
    new: str = ""

    def told(self) -> str:
        """In a few words."""
        if self.how == "changed":
            return f"{self.entry}: {self.old} → {self.new}"
        return f"{self.entry} {self.how}" + (f" ({self.old or self.new})" if self.old or self.new else "")


def contract_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[ContractChange, ...]:
    """Every entry that is not the same in both.

    Args:
        old: JSON; members of a list of texts are entries of their own, since their order does not matter to callers that pass names.
        new: the other.
    """
    ours, theirs = dict(_entries(old)), dict(_entries(new))
    changes = []
    for entry, value in ours.items():
        if entry not in theirs:
            changes.append(ContractChange(entry=entry, how="removed", old=_text(value)))
        elif not _same(value, theirs[entry]):
            changes.append(ContractChange(entry=entry, how="changed", old=_text(value), new=_text(theirs[entry])))
    changes += [
        ContractChange(entry=entry, how="added", new=_text(value))
        for entry, value in theirs.items()
        if entry not in ours
    ]
    return tuple(changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draw:
    count: int
    mean: float
    std: float

    def alike(self, other: _Draw) -> bool:
        """Whether both can be draws of one distribution; NaN only with NaN."""
        if math.isnan(self.std) or math.isnan(other.std):
            return math.isnan(self.std) and math.isnan(other.std)
        if not self.std or not other.std:
            return self.std == other.std and self.mean == other.mean
        count = min(self.count, other.count)
        spread = max(self.std, other.std)
        apart = abs(self.mean - other.mean) / (spread * math.sqrt(2 / max(count, 1)))
        ratio = spread / min(self.std, other.std)
        return apart <= DEVIATIONS and ratio <= two_draws(count, 1)

    def __str__(self) -> str:
        return f"mean {self.mean:.3g}, deviation {self.std:.3g}"


def _entries(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value.keys() >= STATISTICS:
        rest = {key: item for key, item in value.items() if key not in {"mean", "std"}}
        yield f"{place}.values", _Draw(count=int(value["count"]), mean=float(value["mean"]), std=float(value["std"]))
        yield from _entries(rest, place)
    elif isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _entries(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (list, tuple)) and value and all(isinstance(item, str) for item in value):
        for item in value:
            yield f"{place}.{item}", ""
    else:
        yield place, value


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, _Draw) and isinstance(new, _Draw):
        return old.alike(new)
    if isinstance(old, bool) or isinstance(new, bool):
        return old is new
    if isinstance(old, (int, float)) and isinstance(new, (int, float)):
        both_nan = old != old and new != new
        return both_nan or old == new or math.isclose(old, new, rel_tol=CLOSE, abs_tol=0.0)
    return bool(old == new)


def _text(value: Any) -> str:
    return "" if value == "" else (f"{value:.4g}" if isinstance(value, float) else str(value))
