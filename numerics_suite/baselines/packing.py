"""Arrays of many cells in one file, each content once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from numerics_suite.baselines.records import Floats

SAME = 1e-12
"""Two true fp64 values that differ by less, in root mean squares, are stored once.

Float64 leaves 1e-14 between two orders of one sum (attention implementations, threads); semantics are judged at 1e-10.
"""


class Packer:
    """Collects arrays under names; equal content is held once.

    Attributes:
        arrays: by name, contiguous, in the order in which they came.
    """

    def __init__(self) -> None:
        """Nothing is held yet."""
        self.arrays: dict[str, NDArray[Any]] = {}
        self._names: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._true: dict[str, list[str]] = {}
        self._numbers: dict[str, list[float]] = {}

    def put(self, role: str, array: NDArray[Any]) -> str:
        """Hold an array and give the name under which it is held.

        Args:
            role: what the name is made of.
            array: any shape; stored bit for bit.
        """
        held = np.ascontiguousarray(array).reshape(np.shape(array))
        content = (held.dtype.str, held.shape, held.tobytes())
        if content not in self._names:
            name, number = role, 2
            while name in self.arrays:
                name, number = f"{role}~{number}", number + 1
            self._names[content], self.arrays[name] = name, held
        return self._names[content]

    def put_integers(self, role: str, array: NDArray[Any]) -> str:
        """Hold integers in the narrowest of bool (only zeros and ones), int32 and int64."""
        return self.put(role, narrowed(np.asarray(array)))

    def put_true(self, role: str, array: Floats, scale: Floats | float) -> str:
        """Hold true fp64 values, or refer to those of an earlier cell that agree with them.

        Args:
            role: only arrays of one role are compared.
            array: any shape.
            scale: root mean square that the difference is measured in; broadcast to `array`.
        """
        for name in self._true.setdefault(role, []):
            if _agree(self.arrays[name], array, scale):
                return name
        name = self.put(role, np.asarray(array, dtype=np.float64))
        if name not in self._true[role]:
            self._true[role].append(name)
        return name

    def number(self, role: str, value: float) -> float:
        """A true fp64 number, or that of an earlier cell that agrees with it."""
        known = self._numbers.setdefault(role, [])
        for other in known:
            if _agree(np.float64(other), np.float64(value), abs(other)):
                return other
        known.append(float(value))
        return float(value)


def narrowed(array: NDArray[Any]) -> NDArray[Any]:
    """Integers in the narrowest of bool, int32 and int64 that holds them; what is no integer as it is."""
    if array.dtype.kind not in "iu" or not array.size:
        return array
    low, high = int(array.min()), int(array.max())
    if low >= 0 and high <= 1:
        return array.astype(np.bool_)
    limits = np.iinfo(np.int32)
    return array.astype(np.int32) if limits.min <= low and high <= limits.max else array


def joined(rows: Sequence[Floats]) -> Floats:
    """Rows of any length one behind the other, `[sum of lengths]` float64."""
    return np.concatenate([np.asarray(row, dtype=np.float64).reshape(-1) for row in rows]) if rows else np.zeros(0)


def repeated(values: Floats, widths: Sequence[int]) -> Floats:
    """A number per row as a number per element of the joined rows."""
    return np.repeat(values, np.asarray(widths, dtype=np.int64))


def _agree(held: Any, array: Any, scale: Floats | float) -> bool:
    if np.shape(held) != np.shape(array):
        return False
    with np.errstate(invalid="ignore"):
        close = np.abs(held - array) <= SAME * np.asarray(scale)
    same = close | (held == array) | (np.isnan(held) & np.isnan(array))
    return bool(np.all(same))
