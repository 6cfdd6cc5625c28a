"""Flex attention for both references: a rule of its own, since it is a higher-order operator and not an op.

    S' = scale · Q Kᵀ    S = score_mod(S', batch, head, query, key), -inf where mask_mod is False    L, P, O as ever
    dS = P ∘ (dO Vᵀ - D + dL)    dS' = dS · ∂score_mod/∂S', 0 where mask_mod is False

`score_mod` and `mask_mod` are the program's own, mapped over the four indices; the derivative is the graph that torch
traced from `score_mod` and passes to the backward operator. What they compute inside is lifted to float64 too. The
sparse blocks of the mask are ignored: they repeat which keys `mask_mod` excludes.

The operator's log-sum-exp and greatest score are to the base 2, as its kernels compute: L / log 2.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, get_args

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention, flex_attention_backward, math_attention

from numerics_suite.engine.attention_formula import Attention, probabilities
from numerics_suite.engine.reference_ops import tensors_in, widen

if TYPE_CHECKING:
    from collections.abc import Callable

    from numerics_suite.engine.reference_ops import LeanMode

LN2: Final = math.log(2)

RESULTS: Final = len(get_args(inspect.signature(math_attention).return_annotation)) or 2
"""O and L; since torch 2.9 the greatest score of each query too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Flex:
    """One call of flex attention; all floats are float64.

    Attributes:
        attention: Query, keys, values and scale.
        score_mod: Score and its four indices, then `score_buffers` → score.
        mask_mod: The four indices, then `mask_buffers` → whether the query sees the key.
        score_buffers: What `score_mod` reads, where it was traced.
        mask_buffers: What `mask_mod` reads, where it was traced.
    """

    attention: Attention
    score_mod: Callable[..., Any]
    mask_mod: Callable[..., Tensor]
    score_buffers: tuple[Any, ...]
    mask_buffers: tuple[Any, ...]

    def indices(self, rows: slice) -> tuple[Tensor, ...]:
        """Positions of batch, head, query and key that the two functions are mapped over."""
        query, device = self.attention.query, self.attention.query.device
        counts = (0, query.shape[0]), (0, query.shape[1]), (rows.start, rows.stop), (0, self.attention.key.shape[-2])
        return tuple(torch.arange(start, stop, device=device) for start, stop in counts)

    def raw(self, rows: slice) -> Tensor:
        """S' of some queries, `[batch, heads, rows, keys]`."""
        attention = self.attention
        return attention.products(attention.query[:, :, rows], attention.key) * attention.scale

    def seen(self, rows: slice) -> Tensor:
        """Return where a query sees a key, `[batch, heads, rows, keys]`."""
        mask_mod = _over_indices(self.mask_mod, (), (None,) * len(self.mask_buffers))
        seen = mask_mod(*self.indices(rows), *self.mask_buffers)
        assert isinstance(seen, Tensor)
        return seen

    def scores(self, raw: Tensor, rows: slice) -> Tensor:
        """S of some queries, -inf at keys that they do not see."""
        score_mod = _over_indices(self.score_mod, (0,), (None,) * len(self.score_buffers))
        scores = score_mod(raw, *self.indices(rows), *self.score_buffers)
        return torch.where(self.seen(rows), scores.double(), -math.inf)

    def forward(self) -> tuple[Tensor, ...]:
        """Return O, L / log 2 and the greatest score / log 2."""
        found = []
        for rows in self.attention.rows():
            scores = self.scores(self.raw(rows), rows)
            lse = scores.logsumexp(dim=-1)
            out = self.attention.merged(probabilities(scores, lse), self.attention.value)
            found.append((out, lse / LN2, scores.amax(dim=-1) / LN2))
        return tuple(torch.cat(parts, dim=2) for parts in zip(*found, strict=True))

    def backward(self, given: _Saved, derivative: Callable[..., Any]) -> tuple[Any, ...]:
        """Return dQ, dK, dV and, for each of `score_buffers`, its gradient or None."""
        attention = self.attention
        key, value = torch.zeros_like(attention.key), torch.zeros_like(attention.value)
        query: list[Tensor] = []
        captured: list[Tensor | None] = [None] * len(self.score_buffers)
        for rows in attention.rows():
            raw, back = self.raw(rows), given.grad_out[:, :, rows]
            weights = probabilities(self.scores(raw, rows), given.lse[:, :, rows])
            delta = (back * given.out[:, :, rows]).sum(dim=-1) - given.grad_lse[:, :, rows]
            modified = weights * (attention.products(back, attention.value) - delta.unsqueeze(-1))
            scores, *parts = self.through_mod(derivative, raw, modified, rows)
            query.append(attention.merged(scores, attention.key) * attention.scale)
            key += attention.gathered(scores, attention.query[:, :, rows]) * attention.scale
            value += attention.gathered(weights, back)
            captured = [_sum(whole, part) for whole, part in zip(captured, parts, strict=True)]
        return torch.cat(query, dim=2), key, value, captured

    def through_mod(self, derivative: Callable[..., Any], raw: Tensor, modified: Tensor, rows: slice) -> list[Any]:
        """Return dS', and the gradients of what `score_mod` reads, from dS."""
        suffix = (0,) + (None,) * len(self.score_buffers)
        out_dims = [0, None, None, None, None] + [None] * len(self.score_buffers)
        mapped = _over_indices(derivative, (0,), suffix, out_dims)
        scores, _, _, _, _, *parts = mapped(raw, *self.indices(rows), modified, *self.score_buffers)
        return [torch.where(self.seen(rows), scores, 0.0), *parts]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Saved:
    """What a backward pass starts from, float64: O, L (natural), dO and dL (natural)."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor


def _sum(whole: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if whole is None or part is None else whole + part


def _over_indices(
    function: Callable[..., Any], prefix: tuple[Any, ...], suffix: tuple[Any, ...], out_dims: Any = 0
) -> Callable[..., Any]:
    """Map a function of one score over batch, head, query and key."""
    for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        function = torch.vmap(function, in_dims=prefix + dims + suffix, out_dims=out_dims)
    return function


def _flex_of(  # noqa: PLR0913, PLR0917 - the arguments of the operator
    query: Tensor, key: Tensor, value: Tensor, mods: tuple[Any, Any], scale: float, buffers: tuple[Any, Any]
) -> _Flex:
    batch = query.shape[0]  # one set of keys may serve the whole batch
    key, value = (widen(tensor).expand(batch, *tensor.shape[1:]) for tensor in (key, value))
    score_buffers, mask_buffers = (tuple(widen(buffer) for buffer in own) for own in buffers)
    return _Flex(
        attention=Attention(query=widen(query), key=key, value=value, scale=scale),
        score_mod=mods[0],
        mask_mod=mods[1],
        score_buffers=score_buffers,
        mask_buffers=mask_buffers,
    )


def register(mode: type[LeanMode], lifted: Callable[[Any], LeanMode], *, rounds: bool) -> None:
    """Register the rules of both operators for a reference.

    Args:
        mode: The reference's dispatch mode.
        lifted: From the mode to the one under which the formulas run: it lifts what the program's functions compute.
        rounds: Whether results are rounded once to the dtypes that the operator gives.
    """

    @flex_attention.py_impl(mode)
    def forward(  # noqa: PLR0913, PLR0917 - the operator's arguments
        mode: LeanMode,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any,
        block_mask: tuple[Any, ...],
        scale: float,
        kernel_options: Any,  # noqa: ARG001
        score_mod_other_buffers: tuple[Any, ...] = (),
        mask_mod_other_buffers: tuple[Any, ...] = (),
    ) -> tuple[Tensor, ...]:
        call = _flex_of(
            query,
            key,
            value,
            (score_mod, block_mask[-1]),
            scale,
            (score_mod_other_buffers, mask_mod_other_buffers),
        )
        results = _run(mode, lifted(mode), call.forward)[:RESULTS]
        sums = torch.float64 if query.dtype is torch.float64 else torch.float32
        dtypes = (query.dtype, sums, sums)
        return tuple(r.to(d) for r, d in zip(results, dtypes, strict=False)) if rounds else results

    @flex_attention_backward.py_impl(mode)
    def backward(  # noqa: PLR0913, PLR0917 - the operator's arguments
        mode: LeanMode,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        grad_out: Tensor | None,
        grad_logsumexp: Tensor | None,
        fw_graph: Any,
        joint_graph: Any,
        block_mask: tuple[Any, ...],
        scale: float,
        kernel_options: Any,  # noqa: ARG001
        score_mod_other_buffers: tuple[Any, ...] = (),
        mask_mod_other_buffers: tuple[Any, ...] = (),
    ) -> tuple[Any, ...]:
        buffers = score_mod_other_buffers, mask_mod_other_buffers
        call = _flex_of(query, key, value, (fw_graph, block_mask[-1]), scale, buffers)
        saved = _saved(out, logsumexp, grad_out, grad_logsumexp)
        found = _run(mode, lifted(mode), lambda: call.backward(saved, joint_graph))
        gradients = [one.sum_to_size(like.shape) for one, like in zip(found[:3], (query, key, value), strict=True)]
        captured = [
            part if isinstance(buffer, Tensor) and buffer.requires_grad else None
            for part, buffer in zip(found[3], score_mod_other_buffers, strict=True)
        ]
        if rounds:
            gradients = [one.to(like.dtype) for one, like in zip(gradients, (query, key, value), strict=True)]
            captured = [
                None if part is None else part.to(buffer.dtype)
                for part, buffer in zip(captured, score_mod_other_buffers, strict=True)
            ]
        return *gradients, tuple(captured)


def _saved(out: Tensor, logsumexp: Tensor, grad_out: Tensor | None, grad_logsumexp: Tensor | None) -> _Saved:
    lse = widen(logsumexp) * LN2
    return _Saved(
        out=widen(out),
        lse=lse,
        grad_out=torch.zeros_like(widen(out)) if grad_out is None else widen(grad_out),
        grad_lse=torch.zeros_like(lse) if grad_logsumexp is None else widen(grad_logsumexp) / LN2,
    )


def _run(mode: LeanMode, lifted: LeanMode, compute: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Run the formula under `lifted`; `mode` records what could not be lifted."""
    # Lets a function index a tensor by the positions that it is mapped over: `bias[batch, query]`.
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    with lifted, TransformGetItemToIndex():
        results = compute()
    mode.left_out.update(lifted.left_out)
    assert all(tensor.dtype is torch.float64 for tensor in tensors_in(results))
    return results


def watched_by(mode: type[Any], note: Callable[[Any], None] = lambda _: None) -> None:
    """Register a rule that runs flex attention uncompiled, as ops that a watching mode can see.

    Args:
        mode: The dispatch mode.
        note: Called with the mode when the operator runs.
    """
    for operator in (flex_attention, flex_attention_backward):
        plain = operator.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd]  # noqa: SLF001 - torch's own

        def watch(mode: Any, *args: Any, plain: Callable[..., Any] = plain, **kwargs: Any) -> Any:
            note(mode)
            with mode:
                return plain(*args, **kwargs)

        operator.py_impl(mode)(watch)
