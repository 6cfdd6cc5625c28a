"""Scalings of the rotary embedding for contexts longer than those of training.

Each class is one `rope_type`, written from its publication and from what transformers documents for the config's keys
(`modeling_rope_utils.py` of 5.24, the newest release when this was written). Where releases differ, the newest one's
meaning is the definition, and a comment says what the others do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from numerics_suite.definitions.config import OracleUnavailable, rope_kind, rope_section
from numerics_suite.definitions.parts import RotaryTable, allowed_roundoffs, frequencies

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


class Scaling(Protocol):
    """One way to scale the rotary embedding, with the values that one config gives it."""

    @property
    def boundary(self) -> int | None:
        """The longest sequence that has the table of short ones; None where the length changes nothing."""
        ...

    def table(self, theta: float, rotary_dim: int, length: int | None) -> RotaryTable:
        """Frequencies and attention factor.

        Args:
            theta: base of the plain frequencies.
            rotary_dim: how many numbers of a head are rotated.
            length: the greatest position of the batch plus 1; None means a short sequence.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """`linear`: every frequency is divided by the factor. Chen et al. 2023, arXiv:2306.15595, section 2.2."""

    factor: float

    @property
    def boundary(self) -> int | None:
        """None."""
        return None

    def table(self, theta: float, rotary_dim: int, length: int | None) -> RotaryTable:
        """`theta_i / s`: positions shrink by s, which is the same product."""
        del length
        plain = frequencies(theta, rotary_dim)
        return RotaryTable(inv_freq=plain / self.factor, allowed=allowed_roundoffs(plain) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicNtk:
    """`dynamic`: the base grows with the sequence. Peng et al. 2023, arXiv:2309.00071, appendix B.1 and section 3.3.

    Attributes:
        factor: s.
        max_positions: L, which is `max_position_embeddings`. No release reads `original_max_position_embeddings` here.
    """

    factor: float
    max_positions: int

    @property
    def boundary(self) -> int | None:
        """Up to L the frequencies are the plain ones."""
        return self.max_positions

    def table(self, theta: float, rotary_dim: int, length: int | None) -> RotaryTable:
        """`theta' = theta · (s · l / L - (s - 1)) ** (d / (d - 2))`, with l the length and at least L.

        The definition knows only this sequence. transformers remembers the longest one and keeps its base until
        a sequence is shorter than L, so a model that has seen a longer one differs from a fresh one there.
        """
        if rotary_dim <= 2:
            message = "the rotary type 'dynamic' has no meaning for a rotary dimension of 2"
            raise OracleUnavailable(message)
        stretch = self.factor * max(length or 0, self.max_positions) / self.max_positions
        growth, power = stretch - (self.factor - 1), rotary_dim / (rotary_dim - 2)
        inv_freq = frequencies(theta * growth**power, rotary_dim)
        allowed = allowed_roundoffs(inv_freq)
        if growth > 1:
            # A float32 program rounds the stretch twice, the difference once, two powers by up to two roundoffs each.
            allowed += power * (2 * stretch / growth + 1) + 4
        return RotaryTable(inv_freq=inv_freq, allowed=allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """`yarn`: fast pairs keep their frequency, slow ones are divided by the factor. arXiv:2309.00071, section 3.

    Attributes:
        factor: s.
        original: L, the context of the training before.
        attention_factor: multiplies cosines and sines.
        beta_fast: turns within L above which a pair is kept; 32 in section 3.2, where it is beta.
        beta_slow: turns within L below which a pair is divided by s; 1 in section 3.2, where it is alpha.
        truncate: whether the ends of the ramp are moved out to whole pairs.
    """

    factor: float
    original: int
    attention_factor: float
    beta_fast: float
    beta_slow: float
    truncate: bool

    @property
    def boundary(self) -> int | None:
        """None."""
        return None

    def table(self, theta: float, rotary_dim: int, length: int | None) -> RotaryTable:
        """`theta_i · (r_i / s + 1 - r_i)`, with r the ramp from 0 at fast pairs to 1 at slow ones (eq. 22 and 23)."""
        del length
        plain = frequencies(theta, rotary_dim)
        low, high = self._ends(theta, rotary_dim)
        ramp = ((torch.arange(len(plain), dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
        # In float32 the ramp's numerator, denominator and quotient are rounded, and its complement twice.
        error = torch.where((ramp > 0) & (ramp < 1), 3 * ramp + abs(low) / (high - low) + 2, 0.0)
        return _blend(plain, self.factor, ramp, error, scale=self.attention_factor)

    def _ends(self, theta: float, rotary_dim: int) -> tuple[float, float]:
        """Between which pairs the ramp rises.

        In the paper it rises with the number of turns. In the code published with it, which transformers follows and
        whose frequencies YaRN checkpoints were trained with, it rises with the index of the pair. The upper end is
        capped at the rotary dimension less 1 there, not at the number of pairs.
        """

        def pair_of(turns: float) -> float:
            # The i with L · theta ** (-2i / d) / (2 pi) = turns.
            return rotary_dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = pair_of(self.beta_fast), pair_of(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        return low, high + 0.001 if high == low else high  # a step, where both ends are one pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3:
    """`llama3`: long waves are divided by the factor. Source: `apply_scaling` in the model code of Llama 3.1 (Meta, 2024).

    Attributes:
        factor: s; 8 there.
        low_freq_factor: waves longer than L over this are divided by s; 1 there.
        high_freq_factor: waves shorter than L over this are kept; 4 there.
        original: L; 8,192 there.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original: int

    @property
    def boundary(self) -> int | None:
        """None."""
        return None

    def table(self, theta: float, rotary_dim: int, length: int | None) -> RotaryTable:
        """`(1 - m) · theta_i / s + m · theta_i`, m from 0 at long waves to 1 at short ones, linear in `L / wavelength`."""
        del length
        plain = frequencies(theta, rotary_dim)
        waves, width = self.original * plain / (2 * math.pi), self.high_freq_factor - self.low_freq_factor
        smooth = (waves - self.low_freq_factor) / width
        # In float32: the wave's six roundings, those of difference and quotient, and of the complement.
        error = torch.where((smooth > 0) & (smooth < 1), 6 * waves / width + 4, 0.0)
        return _blend(plain, self.factor, 1 - smooth.clamp(0, 1), error)


@dataclass(frozen=True, slots=True, kw_only=True)
class LongRope:
    """`longrope`: a divisor for each pair, of which there are two sets. Ding et al. 2024, arXiv:2402.13753, section 3.2.

    Attributes:
        short_factor: divisors of sequences up to the original length.
        long_factor: those of longer ones.
        original: the context of the training before.
        attention_factor: multiplies cosines and sines, of short sequences too.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original: int
    attention_factor: float

    @property
    def boundary(self) -> int | None:
        """The original length."""
        return self.original

    def table(self, theta: float, rotary_dim: int, length: int | None) -> RotaryTable:
        """`theta_i / lambda_i`, with the long set from one position beyond the original length on."""
        plain = frequencies(theta, rotary_dim)
        divisors = self.long_factor if (length or 0) > self.original else self.short_factor
        if len(divisors) != len(plain):
            message = f"the rotary type 'longrope' has {len(divisors)} factors for {len(plain)} rotated pairs"
            raise OracleUnavailable(message)
        inv_freq = plain / torch.tensor(divisors, dtype=torch.float64)
        # The divisor and its product with the power are rounded too.
        return RotaryTable(inv_freq=inv_freq, scale=self.attention_factor, allowed=allowed_roundoffs(plain) + 2)


def _blend(plain: Tensor, factor: float, share: Tensor, error: Tensor, scale: float = 1.0) -> RotaryTable:
    """`plain · (share / factor + 1 - share)`.

    Args:
        plain: `[pairs]` float64 frequencies.
        factor: what the divided part is divided by.
        share: `[pairs]`, how much of a pair is divided.
        error: `[pairs]`, roundoffs by which a float32 program may be off in `share`.
        scale: of cosines and sines.
    """
    blended = share / factor + 1 - share
    # d(blended) / d(share) is 1/factor - 1; the division, two products and the sum are rounded besides.
    spread = (error * abs(1 - 1 / factor) / blended).max().item()
    return RotaryTable(inv_freq=plain * blended, scale=scale, allowed=allowed_roundoffs(plain) + 4 + spread)


# --- the config's words --------------------------------------------------------------------------------------------


def read_scaling(config: Mapping[str, Any], max_positions: int) -> Scaling | None:
    """How the config scales the rotary embedding, from the 4.x or the 5.x layout; None for the plain one.

    Args:
        config: the raw `config.json`.
        max_positions: its `max_position_embeddings`, or the family's default.

    Raises:
        OracleUnavailable: an unknown type, or one that lacks a key it needs.
    """
    section, kind = rope_section(config), rope_kind(config)
    if kind == "default":
        return None
    if kind not in _READERS:
        message = f"the oracle does not cover the rotary type '{kind}'"
        raise OracleUnavailable(message)
    # The key of the whole config comes first, as in Phi-3's files and in transformers 5; 4.x reads it for `longrope` only,
    # where it knows no other place and takes the ratio of the lengths instead of `factor`.
    original = config.get("original_max_position_embeddings") or section.get("original_max_position_embeddings")
    try:
        return _READERS[kind](section, original or max_positions, max_positions)
    except KeyError as missing:
        message = f"the rotary type '{kind}' needs the key {missing}"
        raise OracleUnavailable(message) from None


def _linear(section: Mapping[str, Any], _: int, __: int) -> Linear:
    return Linear(factor=section["factor"])


def _dynamic(section: Mapping[str, Any], _: int, max_positions: int) -> DynamicNtk:
    return DynamicNtk(factor=section["factor"], max_positions=max_positions)


def _yarn(section: Mapping[str, Any], original: int, max_positions: int) -> Yarn:
    # The key is the factor. Up to 4.55 transformers took the ratio of the two lengths where both were given, which 5.x
    # does for a null only: transformers#38224.
    given = section["factor"]
    factor = max_positions / original if given is None else float(given)
    return Yarn(
        factor=factor,
        original=original,
        attention_factor=_yarn_attention(section, factor),
        beta_fast=section.get("beta_fast") or 32,
        beta_slow=section.get("beta_slow") or 1,
        truncate=bool(section.get("truncate", True)),
    )


def _yarn_attention(section: Mapping[str, Any], factor: float) -> float:
    """`sqrt(1 / t) = 0.1 ln s + 1` (arXiv:2309.00071, eq. 24), or the ratio of two such, with weights (DeepSeek-V3)."""
    if section.get("attention_factor") is not None:
        return float(section["attention_factor"])

    def of_weight(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight, weight_all = section.get("mscale"), section.get("mscale_all_dim")
    return of_weight(weight) / of_weight(weight_all) if weight and weight_all else of_weight(1.0)


def _llama3(section: Mapping[str, Any], original: int, _: int) -> Llama3:
    return Llama3(
        factor=section["factor"],
        low_freq_factor=section["low_freq_factor"],
        high_freq_factor=section["high_freq_factor"],
        original=original,
    )


def _longrope(section: Mapping[str, Any], original: int, max_positions: int) -> LongRope:
    given = section.get("factor")
    factor = max_positions / original if given is None else float(given)
    attention = section.get("attention_factor")
    if attention is None:
        # `sqrt(1 + ln s / ln L)`: the model code of Phi-3 (Microsoft, 2024).
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return LongRope(
        short_factor=tuple(section["short_factor"]),
        long_factor=tuple(section["long_factor"]),
        original=original,
        attention_factor=float(attention),
    )


_READERS: Mapping[str, Callable[[Mapping[str, Any], int, int], Scaling]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
"""`rope_type` → reader of its section, given that section, the original length and `max_position_embeddings`."""
