"""The formulas of the definitions, each as published, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from numerics_suite.definitions.config import OracleUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from numerics_suite.definitions.weights import Weights

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    # x / (1 + exp(-x)), Elfwing et al. 2017; "swish" is its other name.
    "silu": lambda x: x * torch.sigmoid(x),
    "swish": lambda x: x * torch.sigmoid(x),
    # x times the normal distribution function of x, and its tanh approximation: Hendrycks and Gimpel 2016.
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_pytorch_tanh": lambda x: x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function of that name.

    Raises:
        OracleUnavailable: an unknown name.
    """
    if name not in _ACTIVATIONS:
        message = f"the oracle does not cover the activation '{name}'"
        raise OracleUnavailable(message)
    return _ACTIVATIONS[name]


def frequencies(theta: float, rotary_dim: int) -> Tensor:
    """`theta ** (-2i / rotary_dim)` for i from 0, `[rotary_dim / 2]`: Su et al. 2021, section 3.2.2."""
    return theta ** -(torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)


def allowed_roundoffs(exact: Tensor) -> float:
    """How far a right table may be from the exact one, in unit roundoffs of its dtype.

    Two roundings, the power and its inverse. The exponent `2i / rotary_dim` is exact where the dimension is a power of
    two (64 in every published GLM-4); elsewhere it is rounded too, and the power magnifies that by the logarithm of its
    result.

    Args:
        exact: `[pairs]` float64, which ends with the smallest.
    """
    pairs = len(exact)
    return 2.0 if pairs & (pairs - 1) == 0 else 2.0 - math.log(exact[-1].item())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RotaryTable:
    """What a rotary embedding computes with, unrounded.

    Attributes:
        inv_freq: `[pairs]` float64, radians per position.
        scale: what cosines and sines are multiplied by. Of a head that is rotated in part, the rest is not scaled.
        allowed: how far a right program's table may be from `inv_freq`, in unit roundoffs of its dtype.
    """

    inv_freq: Tensor
    scale: float = 1.0
    allowed: float

    @classmethod
    def plain(cls, inv_freq: Tensor) -> RotaryTable:
        """The table of frequencies that are a power of a base."""
        return cls(inv_freq=inv_freq, allowed=allowed_roundoffs(inv_freq))


def roundoffs_apart(table: Tensor, exact: Tensor) -> float:
    """How far a model's rotary table is from the exact one at the worst entry, in unit roundoffs of its dtype.

    Args:
        table: as the model holds it; a float64 one is taken for the upcast of a float32 one.
        exact: `[pairs]` float64.

    Returns:
        At most :func:`allowed_roundoffs` for a right table; infinite for another length and for NaN.
    """
    if table.shape != exact.shape:
        return math.inf
    dtype = torch.float32 if table.dtype is torch.float64 else table.dtype
    apart = ((table.detach().to(exact) - exact) / exact).abs().max().item() / (torch.finfo(dtype).eps / 2)
    return apart if math.isfinite(apart) else math.inf


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the first neighbouring pairs of each head, as complex numbers, and leave the rest alone.

    Args:
        x: `[B, T, heads, head_dim]`.
        turn: `scale · exp(i · position · frequency)`, `[B or 1, T, 1, pairs]` complex.
    """
    width = 2 * turn.shape[-1]
    pairs = torch.view_as_complex(torch.unflatten(x[..., :width], -1, (-1, 2)).contiguous())
    return torch.cat((torch.view_as_real(pairs * turn).flatten(-2), x[..., width:]), dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Scaled dot-product attention, each key-value head serving a run of consecutive query heads.

    Vaswani et al. 2017 for the formula, Ainslie et al. 2023 for the grouping.

    Args:
        query: `[B, T, heads, D]`.
        key: `[B, T, groups, D]`.
        value: `[B, T, groups, D]`.
        visible: `[B, T, T]` bool, which key each query sees.

    Returns:
        `[B, T, heads · D]`.
    """
    grouped = torch.unflatten(query, 2, (key.shape[2], -1))
    scores = torch.einsum("btgrd,bsgd->bgrts", grouped, key) / math.sqrt(query.shape[-1])
    probabilities = scores.masked_fill(~visible[:, None, None], -math.inf).softmax(-1)
    return torch.einsum("bgrts,bsgd->btgrd", probabilities, value).flatten(2)


def visible_keys(mask: Tensor | None, batch: int, length: int) -> Tensor:
    """`[B, T, T]` bool: a query sees the keys that are not padding, up to and with its own position.

    A padded query that sees nothing sees itself, so that its row is finite; no real row reads it.
    """
    causal = torch.ones(length, length, dtype=torch.bool).tril().expand(batch, -1, -1)
    if mask is None:
        return causal
    seen = causal & mask.bool()[:, None, :]
    return seen | (torch.eye(length, dtype=torch.bool) & ~seen.any(-1, keepdim=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleScope:
    """A place in the model: reads the weights below a path and records its outputs."""

    path: str
    weights: Weights
    note: Callable[[str, Tensor], Tensor]

    def below(self, name: str) -> ModuleScope:
        """The place of a sub-module."""
        return ModuleScope(path=f"{self.path}.{name}", weights=self.weights, note=self.note)

    def output(self, value: Tensor) -> Tensor:
        """Record `value` as the output of this module."""
        return self.note(self.path, value)

    def linear(self, name: str, x: Tensor, *, bias: bool = False) -> Tensor:
        """`x Wᵀ (+ b)` with the weights of the sub-module `name`; `[…, in]` to `[…, out]`."""
        path = f"{self.path}.{name}"
        x = self.note(f"{path}:input", x)
        offset = self.weights(f"{path}.bias") if bias else None
        return self.note(path, functional.linear(x, self.weights(f"{path}.weight"), offset))

    def rms_norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        """`w · x / sqrt(mean(x²) + eps)`: Zhang and Sennrich 2019, eps within the root."""
        path = f"{self.path}.{name}"
        x = self.note(f"{path}:input", x)
        return self.note(path, self.weights(f"{path}.weight") * x / (x.square().mean(-1, keepdim=True) + eps).sqrt())
