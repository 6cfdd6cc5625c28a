"""Errors in units of the precision's own rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

CANCELLED: Final = 1e-12
"""A gradient this small beside the model's largest (root mean squares) is the remainder of terms that cancel.

Attention does not change when every key moves alike, so without rotary positions the gradient of a key's bias is zero;
in float64 the sum of its terms leaves 1e-16 of them, and no two orders of summation leave the same.
"""


_SAFE_SQUARES: Final = (1e-280, 1e280)
"""Range of sums of squares that float64 represents in full, with 20 orders of magnitude to spare for the elements."""

_PART: Final = 1 << 18
"""Elements that are compared at a time: allocating memory for a whole embedding costs ten times the comparison."""


def unit_roundoff(dtype: torch.dtype) -> float:
    """Return the largest relative error of rounding once to `dtype`, half its epsilon: 2**-24 for float32."""
    # eps is the spacing above 1, 2 ** (1 - p) with p significand bits; rounding to nearest errs by half of it at most.
    return torch.finfo(dtype).eps / 2


def wide(values: Tensor) -> Tensor:
    """The values in float64, complex128 of complex ones: on their own device if it supports these, else on the CPU.

    MPS has no float64 and raises TypeError.
    """
    dtype = torch.complex128 if values.is_complex() else torch.float64
    try:
        return values.detach().to(dtype)
    except TypeError:
        return values.detach().cpu().to(dtype)


def rms(values: Tensor) -> float:
    """Return the root mean square over all elements, in float64; NaN with a NaN, 0.0 for an empty tensor."""
    if values.numel() == 0:
        return 0.0
    if (found := _rms_of(wide(part) for (part,) in _parts(values))) is not None:
        return found
    sizes = wide(values.abs())
    largest = sizes.max().item()
    if largest == 0.0 or not math.isfinite(largest):
        return float(largest)
    return float((sizes / largest).square().mean().sqrt().item() * largest)


def rms_difference(got: Tensor, want: Tensor) -> float:
    """Return the root mean square of got - want in float64, on the device of `want`; NaN with a NaN.

    Raises:
        ValueError: The shapes differ.
    """
    _same_shape(got, want)
    # Piece by piece, since three float64 copies of an embedding cost more to allocate than to subtract.
    found = _rms_of(wide(one).to(want.device) - wide(other) for one, other in _parts(got, want))
    return rms(wide(got).to(want.device) - wide(want)) if found is None else found


def _rms_of(parts: Iterable[Tensor]) -> float | None:
    """The root mean square over all parts, float64; None where the squares' sum is beyond what is safe, NaN or inf."""
    squares, count = 0.0, 0
    for part in parts:
        norm = float(torch.linalg.vector_norm(part))
        squares, count = squares + norm * norm, count + part.numel()
    # Squares from 1e-280 to 1e280 neither overflow nor lose digits; what lies beyond is scaled first, and NaN and inf named.
    return math.sqrt(squares / count) if _SAFE_SQUARES[0] < squares < _SAFE_SQUARES[1] else None


def power_sum(values: Tensor, power: int) -> float:
    """The sum of the elements' sizes, or of their squares, in float64."""
    return math.fsum(float(torch.linalg.vector_norm(wide(part), power)) ** power for (part,) in _parts(values))


def _parts(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The elements of tensors of one shape, :data:`_PART` of each at a time."""
    flat = [tensor.detach().reshape(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _PART):
        yield tuple(each[start : start + _PART] for each in flat)


def _size(values: Tensor) -> float:
    """The largest absolute value; NaN with a NaN."""
    if values.is_complex() or values.numel() == 0:
        return float(values.abs().max()) if values.numel() else 0.0
    least, most = torch.aminmax(values)
    return float(torch.maximum(-least, most))


def largest_difference(got: Tensor, want: Tensor) -> float:
    """Return max|got - want| in float64; NaN if either has a NaN, 0.0 for empty tensors.

    Equal infinities differ by nothing; unequal ones by infinity.

    Raises:
        ValueError: The shapes differ.
    """
    _same_shape(got, want)
    if got.numel() == 0:
        return 0.0
    largest = [_size(wide(one) - wide(other)) for one, other in _parts(got, want)]
    # Infinity less infinity is NaN: only then are the elements compared one by one.
    return max(largest) if all(map(math.isfinite, largest)) else float(_difference(got, want).max().item())


def relative_error(got: Tensor, want: Tensor) -> float:
    """Return max|got - want| / rms(want); inf where `want` is exactly zero and `got` is not, NaN with a NaN.

    Raises:
        ValueError: The shapes differ.
    """
    return _ratio(largest_difference(got, want), rms(want))


@dataclass(slots=True)
class GradientComparison:
    """Gradients beside what they should be, of which one pair at a time need be in memory.

    Attributes:
        lost: names of those that are not there, and should not be zero.
    """

    lost: list[str] = field(default_factory=list)
    _sizes: dict[str, tuple[float, float]] = field(default_factory=dict)
    _counts: dict[str, int] = field(default_factory=dict)
    _differences: dict[str, float] = field(default_factory=dict)
    _products: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> GradientComparison:
        """Compare all that are wanted; otherwise as :meth:`add`."""
        compared = cls()
        for name, wanted in want.items():
            compared.add(name, got.get(name), wanted)
        return compared

    def add(self, name: str, got: Tensor | None, want: Tensor) -> None:
        """Compare one.

        Args:
            name: of the parameter.
            got: its gradient in float64, None where there is none.
            want: what it should be.

        Raises:
            ValueError: The shapes differ.
        """
        self._sizes[name], self._counts[name] = (rms(want), _size(want)), want.numel()
        if got is None:
            self.lost += [name] if bool(want.any()) else []
            return
        self._differences[name] = largest_difference(got, want)
        if self._differences[name]:  # ⟨got, want⟩ says along what it differs
            self._products[name] = float(torch.dot(wide(got).reshape(-1), wide(want).reshape(-1)))

    def errors(self) -> dict[str, float]:
        """max|got - want| / max|want| of each gradient that both have; see :func:`gradient_errors`."""
        largest = max((size for size, _ in self._sizes.values() if math.isfinite(size)), default=0.0)
        return {
            name: _ratio(difference, largest if self._sizes[name][0] <= CANCELLED * largest else self._sizes[name][1])
            for name, difference in self._differences.items()
        }

    def wrong(self, most: float) -> list[str]:
        """Names of those whose max|got - want| / rms(want) is above the limit, or NaN, and of the lost ones."""
        found = self._differences.items()
        return [name for name, value in found if not _ratio(value, self._sizes[name][0]) <= most] + self.lost

    def projection(self, names: Iterable[str]) -> float:
        """The projection ⟨got, want⟩/⟨want, want⟩ over some gradients that both have; NaN if these should be zero."""
        squares = {name: self._sizes[name][0] ** 2 * self._counts[name] for name in names}
        size = sum(squares.values())
        return sum(self._products.get(name, square) for name, square in squares.items()) / size if size else math.nan


def gradient_errors(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> dict[str, float]:
    """Return max|got - want| / max|want| of each gradient that both have: the forward error in the maximum norm.

    Not over the root mean square, as for answers: most rows of an embedding's gradient are zero, and a few outliers make
    up others, so that it would grow with the vocabulary (1.1e-11 on a right model of 135M parameters). One that cancels to nothing (:data:`CANCELLED`) has no scale of its own: it is measured against the largest one's.

    Args:
        got: gradients of all parameters by name, float64.
        want: the ones they should be.

    Raises:
        ValueError: The shapes of a gradient differ.
    """
    return GradientComparison.of(got, want).errors()


def filled(gradients: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of the wanted names; one that is not there is zero."""
    return {name: gradients[name] if name in gradients else torch.zeros_like(value) for name, value in wanted.items()}


def rms_error_in_roundoffs(got: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """Return rms(got - want) / rms(want) in unit roundoffs of `dtype`.

    Raises:
        ValueError: The shapes differ.
    """
    _same_shape(got, want)
    return _ratio(rms(_difference(got, want)), rms(want)) / unit_roundoff(dtype)


def _difference(got: Tensor, want: Tensor) -> Tensor:
    wide_got, wide_want = wide(got), wide(want)
    difference = (wide_got - wide_want).abs()
    # inf - inf is NaN, though both answers agree; two -inf at a masked place are no error.
    return torch.where(wide_got == wide_want, torch.zeros_like(difference), difference)


def _ratio(error: float, scale: float) -> float:
    if math.isnan(error) or math.isnan(scale):
        return math.nan
    # 0 / 0 is no error: a bias that is exactly zero in both runs agrees. x / 0 is infinite, never a pass.
    if error == 0.0:
        return 0.0
    if scale == 0.0 or math.isinf(error):
        return math.inf
    return math.nan if math.isinf(scale) else error / scale


def _same_shape(got: Tensor, want: Tensor) -> None:
    if got.shape != want.shape:
        message = f"shapes differ: got {tuple(got.shape)}, want {tuple(want.shape)}"
        raise ValueError(message)
