"""A tensor in a few numbers, by formula: no generator of any release has a part in them.

The weights of a projection are one number for each row times one for each column, each of a size between 0.48 and 1.44 and
of either sign. So a sketch costs one product with the tensor, one element that changes is always seen, and so are two
rows that change places.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
import torch
from torch import Tensor

from numerics_suite.baselines.records import Sketch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from numerics_suite.baselines.records import Floats, Ids

PROJECTIONS: Final = 4
"""Of a sketch."""

WIDE: Final = 80
"""An answer with more numbers a token is kept as projections."""

TOKEN_PROJECTIONS: Final = 64
TOP: Final = 8

_BLOCK: Final = 1 << 23
"""Elements that are widened to float64 at a time."""

_MEAN_SQUARE: Final = 13 / 12


def mixed(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Each number hashed to 64 bits (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        # Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014); uint64 wraps around by definition.
        value = numbers + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(value ^ (value >> np.uint64(31)))


def hashed(name: str, count: int, start: int = 0) -> NDArray[np.uint64]:
    """Numbers `start` to `start + count` of the stream of that name, 64 bits each."""
    seed = np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))
    with np.errstate(over="ignore"):
        return mixed(mixed(np.arange(start, start + count, dtype=np.uint64)) + seed)


def uniform(name: str, count: int, start: int = 0) -> Floats:
    """Numbers of the stream of that name, each at least 0 and below 1."""
    # The upper 53 bits as a fraction: each is exact in float64, and 1.0 never occurs.
    return np.asarray((hashed(name, count, start) >> np.uint64(11)).astype(np.float64) * 2.0**-53)


@functools.lru_cache(maxsize=256)
def _weights(name: str, projections: int, start: int, count: int) -> Tensor:
    """`[projections, count]` float64, root mean square 1, none near zero."""
    rows = []
    for index in range(projections):
        drawn = uniform(f"{name} {index}", count, start)
        sign = np.where(drawn < 0.5, -1.0, 1.0)
        # The size is uniform on [0.5, 1.5): its mean square is 1 + 1/12 = 13/12. None is near 0, so no element can hide.
        rows.append(sign * (0.5 + (2 * drawn) % 1) / math.sqrt(_MEAN_SQUARE))
    return torch.from_numpy(np.stack(rows))


def _row_weights(start: int, count: int) -> Tensor:
    """Kept in blocks, since streams of states ask for every other place."""
    size = 4096
    if start // size == (start + count - 1) // size:
        block = start // size * size
        return _weights("row", PROJECTIONS, block, size)[:, start - block : start - block + count]
    return _weights("row", PROJECTIONS, start, count)


@dataclass(slots=True)
class Sketcher:
    """Sketches rows as they come, and keeps none of them.

    Attributes:
        shape: of a row.
        squares: their sum.
        sums: `[PROJECTIONS]`.
    """

    rows: int = 0
    count: int = 0
    shape: tuple[int, ...] | None = None
    squares: float = 0.0
    sums: Tensor = field(default_factory=lambda: torch.zeros(PROJECTIONS, dtype=torch.float64))

    def add(self, values: Tensor) -> None:
        """Take rows.

        Args:
            values: `[rows, …]`, any float.
        """
        if values.is_complex():
            values = torch.view_as_real(values)
        values = values.detach()
        self.shape = tuple(values.shape[1:]) if self.shape is None else self.shape
        flat = values.reshape(values.shape[0], -1)
        step = max(1, _BLOCK // max(flat.shape[1], 1))
        for start in range(0, flat.shape[0], step):
            self._add(flat[start : start + step].cpu().double())

    def _add(self, flat: Tensor) -> None:
        if not flat.numel():
            return
        rows, width = flat.shape
        columns = _weights("column", PROJECTIONS, 0, width)
        # Σ over rows i and columns j of r_i c_j x_ij. Row weights go on counting over calls, so the pieces' order matters,
        # as it must: a sketch sees two rows that change places.
        self.sums += ((flat @ columns.t()) * _row_weights(self.rows, rows).t()).sum(0)
        self.squares += float(torch.linalg.vector_norm(flat)) ** 2
        self.rows += rows
        self.count += flat.numel()

    def sketch(self) -> Sketch:
        """Of everything seen."""
        # Divided by sqrt(count): a projection of noise has the size of the noise, whatever the number of elements.
        size = math.sqrt(max(self.count, 1))
        return Sketch(
            shape=(self.rows, *(self.shape or ())),
            count=self.count,
            rms=math.sqrt(self.squares) / size if math.isfinite(self.squares) else self.squares,
            projections=(self.sums / size).numpy().copy(),
        )


def sketch(values: Tensor) -> Sketch:
    """The sketch of a whole tensor; its shape is the tensor's own."""
    sketcher = Sketcher()
    sketcher.add(values if values.dim() > 1 else values.reshape(1, -1))
    made = sketcher.sketch()
    return Sketch(shape=tuple(values.shape), count=made.count, rms=made.rms, projections=made.projections)


def nothing(shape: tuple[int, ...]) -> Sketch:
    """The sketch of a tensor of zeros."""
    return Sketch(shape=shape, count=math.prod(shape), rms=0.0, projections=np.zeros(PROJECTIONS))


def condensed(answer: Tensor) -> tuple[Floats, bool, Floats, Ids]:
    """An answer as it is stored: values, whether they are the answer itself, largest values, their ids.

    Args:
        answer: `[tokens, width]` float64.
    """
    tokens, width = answer.shape
    if width <= WIDE:
        nothing = np.zeros((tokens, 0))
        return answer.numpy().copy(), True, nothing, nothing.astype(np.int64)
    values = answer @ _weights("answer", TOKEN_PROJECTIONS, 0, width).t() / math.sqrt(width)
    top = answer.topk(TOP, dim=1)
    return values.numpy(), False, top.values.numpy(), top.indices.numpy()
