"""Attention in float64, forward and backward, a few queries at a time.

    S = scale · Q Kᵀ + bias, -inf where a query does not see a key
    L = log Σ exp S        P = exp(S - L)        O = P V
    dV = Pᵀ dO    D = Σ dO ∘ O    dS = P ∘ (dO Vᵀ - D)    dQ = scale · dS K    dK = scale · dSᵀ Q    dbias = dS

The backward formula is that of FlashAttention-2 (Dao 2023, algorithm 2). It takes O and L as the program saved them: in
the rounded run they are rounded, which is a part of what the precision costs.

A query that sees no key: P and O are 0, as in every op since torch 2.5 (the row of a plain softmax would be NaN);
L is the logarithm of an empty sum, -inf. The kernels store what suits them (0 on the CPU, +inf in flash); nothing but
their own backward ops reads it, and P is 0 there by the mask, whatever L is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

SCORES: Final = 1 << 25
"""Scores that are held at once (256 MiB in float64): a fused op exists so that they never all are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Gradients of an attention, each in the shape of its tensor; `bias` is None without one."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One attention; all tensors are float64.

    Query head h reads the key head h // (heads / key heads), as in every op and in transformers' `repeat_kv`.

    Attributes:
        query: `[batch, heads, M, size]`.
        key: `[batch, key heads, N, size]`.
        value: `[batch, key heads, N, size of a value]`.
        scale: Factor of the products.
        bias: Added to the scores, shape broadcastable to `[batch, heads, M, N]`; or boolean, False for an unseen key.
        lowest: Query i sees no key before i + lowest; None: no such bound.
        highest: Query i sees no key after i + highest (0: causal, aligned top left); None: no such bound.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None = None
    lowest: int | None = None
    highest: int | None = None

    def within(self, *, lowest: int | None, highest: int | None) -> Attention:
        """Return the same attention with other bounds."""
        return replace(self, lowest=lowest, highest=highest)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return O `[batch, heads, M, size of a value]` and L `[batch, heads, M]`."""
        outs, sums = [], []
        for rows in self.rows():
            scores = self._scores(rows)
            # logsumexp subtracts the row's maximum first, so exp does not overflow however large the scores are.
            lse = scores.logsumexp(dim=-1)
            outs.append(self.merged(probabilities(scores, lse), self.value))
            sums.append(lse)
        return torch.cat(outs, dim=-2), torch.cat(sums, dim=-1)

    def backward(self, grad_out: Tensor, out: Tensor, lse: Tensor) -> Gradients:
        """Return the gradients, given dO and the forward pass's O and L."""
        query, bias = [], self._no_bias_gradient()
        key, value = torch.zeros_like(self.key), torch.zeros_like(self.value)
        for rows in self.rows():
            weights = probabilities(self._scores(rows), lse[:, :, rows])
            back = grad_out[:, :, rows]
            # D = Σ dO ∘ O equals Σ P ∘ (dO Vᵀ) of the same row (FlashAttention, Dao 2022), and needs no matrix of M × N.
            delta = (back * out[:, :, rows]).sum(dim=-1, keepdim=True)
            scores = weights * (self.products(back, self.value) - delta)
            # dV = Pᵀ dO: with grouped heads the sum runs over the query heads of the group too.
            value += self.gathered(weights, back)
            query.append(self.merged(scores, self.key) * self.scale)
            key += self.gathered(scores, self.query[:, :, rows]) * self.scale
            if bias is not None:
                part = bias[..., rows, :] if bias.shape[-2] > 1 else bias
                # A bias that was broadcast has the gradient Σ over what it was broadcast to.
                part += scores.sum_to_size(part.shape)
        return Gradients(query=torch.cat(query, dim=-2), key=key, value=value, bias=self._shaped_bias(bias))

    def rows(self) -> Iterator[slice]:
        """Yield slices of the queries; one empty slice where there is no query."""
        batch, heads, count, _ = self.query.shape
        # Rows of S are independent of each other, so any cut along the queries gives the same numbers.
        step = max(1, SCORES // max(1, batch * heads * self.key.shape[-2]))
        yield from (slice(start, min(start + step, count)) for start in range(0, max(count, 1), step))

    def _scores(self, rows: slice) -> Tensor:
        """S of some queries, `[batch, heads, rows, N]`, -inf at keys that they do not see."""
        scores = self.products(self.query[:, :, rows], self.key) * self.scale
        if self.bias is not None:
            part = self.bias[..., rows, :] if self.bias.dim() > 1 and self.bias.shape[-2] > 1 else self.bias
            scores = scores.masked_fill(~part, -math.inf) if part.dtype is torch.bool else scores + part
        distance = self._distance(rows) if (self.lowest, self.highest) != (None, None) else None
        if distance is not None and self.lowest is not None:
            scores = scores.masked_fill(distance < self.lowest, -math.inf)
        if distance is not None and self.highest is not None:
            scores = scores.masked_fill(distance > self.highest, -math.inf)
        return scores

    def _distance(self, rows: slice) -> Tensor:
        """Key's position less query's, `[rows, N]`."""
        device = self.query.device
        queries = torch.arange(rows.start, rows.stop, device=device)
        return torch.arange(self.key.shape[-2], device=device) - queries[:, None]

    # With grouped heads the queries of a group are stacked to more rows of one product, so that no key is repeated.

    def products(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Rows of each query head times the columns of its key head: `[batch, heads, rows, N]`."""
        return self._apart(self._stacked(rows) @ columns.transpose(-2, -1), rows.shape[-2])

    def merged(self, weights: Tensor, columns: Tensor) -> Tensor:
        """Σ over keys of weight times column: `[batch, heads, rows, size]`."""
        return self._apart(self._stacked(weights) @ columns, weights.shape[-2])

    def gathered(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Σ over queries, and over the heads of a group, of weight times row: `[batch, key heads, N, size]`."""
        return self._stacked(weights).transpose(-2, -1) @ self._stacked(rows)

    def _stacked(self, tensor: Tensor) -> Tensor:
        batch, _, rows, size = tensor.shape
        groups = self.key.shape[1]
        return tensor.reshape(batch, groups, self.query.shape[1] // groups * rows, size)

    def _apart(self, tensor: Tensor, rows: int) -> Tensor:
        return tensor.reshape(tensor.shape[0], self.query.shape[1], rows, tensor.shape[-1])

    def _no_bias_gradient(self) -> Tensor | None:
        if self.bias is None or self.bias.dtype is torch.bool:
            return None
        missing = (1,) * max(0, 2 - self.bias.dim())
        return torch.zeros_like(self.bias, memory_format=torch.contiguous_format).reshape(missing + self.bias.shape)

    def _shaped_bias(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None or self.bias is None else gradient.reshape(self.bias.shape)


def probabilities(scores: Tensor, lse: Tensor) -> Tensor:
    """Return P = exp(S - L), and 0 at an unseen key even where L is infinite: -inf less -inf would be NaN."""
    return (scores - lse.unsqueeze(-1)).exp().masked_fill(scores == -math.inf, 0.0)
