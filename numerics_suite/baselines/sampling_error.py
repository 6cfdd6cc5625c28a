"""How far two draws of the same rounding may be apart, and from where on there is more to it than chance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

FALSE_ALARMS: Final = 1e-4
"""Probability that chance alone makes any comparison of a cell look worse: one in ten thousand cells."""

SHARE: Final = 4
"""Numbers that count as one free draw. Errors along a row share a factor (a norm's statistic, a softmax's sum) and have
heavier tails than a normal draw's, both of which leave fewer free numbers than there are elements."""

MARGIN: Final = 0.05
"""A loss of this share is none: the least that one more rounding adds, 0.43 roundoffs to the 1.15 of an attention, is 7 %."""

ROUNDOFF: Final = {
    "fp64": 2.0**-53,
    "fp32": 2.0**-24,
    "tf32": 2.0**-11,
    "bf16": 2.0**-8,
    "amp-bf16": 2.0**-8,
    "fp16": 2.0**-11,
    "amp-fp16": 2.0**-11,
    "pure-fp16": 2.0**-11,
}
"""Unit roundoff by precision; the unit of local errors."""


def two_draws(count: float, comparisons: int) -> float:
    """The largest ratio of two root mean squares of independent rounding that is put down to chance.

    The squares of two such ratios have an F distribution with n and n degrees of freedom, whose tail beyond the square of r is
    that of a binomial, at most cosh(log r) ** (1 - n) by Chernoff's bound (for large n, exp(-n log(r)**2 / 2): the
    logarithm of the ratio strays by 1 / sqrt(n)). Roundings that two versions have in common bring the ratio nearer to 1.

    Args:
        count: numbers that each root mean square is taken over.
        comparisons: of the cell, which share the probability of a false alarm.

    Returns:
        At least 1; infinite where two numbers or fewer are free, which tell nothing.
    """
    free = count / SHARE
    if free <= 2:
        return math.inf
    # Chernoff: P(ratio > r) <= cosh(log r) ** (1 - n) =: p, so log cosh(log r) = log(1 / p) / (n - 1), with p shared
    # by all comparisons (Bonferroni). With b = cosh(log r), log r = arcosh(b), so r = b + sqrt(b² - 1).
    exponent = math.log(max(comparisons, 1) / FALSE_ALARMS) / (free - 1)
    bound = math.exp(min(exponent, 700.0))
    return (bound + math.sqrt(bound * bound - 1)) * (1 + MARGIN)


def accumulation(shapes: Iterable[tuple[int, ...]], precision: str) -> float:
    """How much another order of float32 sums may add to a local error, in unit roundoffs of the precision.

    Kernels accumulate in float32, in an order that the library and the machine choose: from blocks whose error hardly grows
    to one long chain, whose error grows like the square root of its length.

    Args:
        shapes: of the parameters; a matrix `[out, in]` sums over `in`.
        precision: of the cell.
    """
    # Random walk: a chain of K float32 additions errs by about sqrt(K) roundoffs (Higham and Mary, 2019), not by K.
    longest = max((shape[-1] for shape in shapes if len(shape) > 1), default=1)
    return math.sqrt(longest) * ROUNDOFF["fp32"] / ROUNDOFF[precision] if precision != "fp64" else math.sqrt(longest)
