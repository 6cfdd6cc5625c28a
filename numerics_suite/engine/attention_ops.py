"""What each fused attention op computes from its arguments, in float64: the formulas are in `attention_formula`.

The alignment of the causal triangle, the layout of the results and the shape of a log-sum-exp differ between the
ops; each function says which it uses. Shapes are those of torch's meta kernels (`_meta_registrations.py`).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from numerics_suite.engine.attention_formula import Attention, Gradients
from numerics_suite.engine.reference_ops import widen

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Given = Mapping[str, Any]


def _present(tensor: Tensor | None) -> Tensor | None:
    """None for an undefined tensor, which some backward ops get for "no bias" as an empty one."""
    return None if tensor is None or tensor.numel() == 0 else widen(tensor)


def _attention(given: Given, *, bias: str = "", bottom_right: bool = False, heads_second: bool = True) -> Attention:
    """Return the attention of an op that takes dense tensors.

    Args:
        given: Arguments by name.
        bias: Name of the mask that is added, or of a boolean one that is True where a query sees a key.
        bottom_right: Where the causal triangle is aligned if there are more keys than queries, or fewer.
        heads_second: Layout `[batch, heads, tokens, size]`; else `[batch, tokens, heads, size]`.
    """
    query, key, value = (widen(given[name]) for name in ("query", "key", "value"))
    if not heads_second:
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scale = given["scale"]
    shift = key.shape[-2] - query.shape[-2] if bottom_right else 0
    return Attention(
        query=query,
        key=key,
        value=value,
        # The caller of a CUDA op pads the size of a head to a multiple of 8 and passes the scale of the true size.
        scale=1 / math.sqrt(query.shape[-1]) if scale is None else float(scale),
        bias=_present(given[bias]) if bias else None,
        highest=shift if given.get("is_causal") else None,
    )


def _philox(query: Tensor) -> tuple[Tensor, Tensor]:
    """Seed and offset of the random state, int64 scalars of 0: no random number was drawn."""
    return (torch.zeros((), dtype=torch.int64, device=query.device),) * 2


def _laid_out_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the strides of `like` where the shapes agree: a program may `view` what a kernel returns."""
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor) if tensor.shape == like.shape else tensor


def _tokens_second(tensor: Tensor) -> Tensor:
    """`[batch, heads, tokens, size]` in the memory of `[batch, tokens, heads, size]`."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


# --- the CPU's flash op --------------------------------------------------------------------------------------------


def flash_cpu(given: Given) -> tuple[Any, ...]:
    """Causal is aligned top left (FlashAttentionKernel.cpp: row m of a block sees keys up to m)."""
    out, lse = _attention(given, bias="attn_mask").forward()
    return _tokens_second(out), lse


def flash_cpu_backward(given: Given) -> tuple[Any, ...]:
    """Return dQ, dK, dV."""
    found = _backward(_attention(given, bias="attn_mask"), given, given["grad_out"])
    return found.query, found.key, found.value


def _backward(attention: Attention, given: Given, grad_out: Tensor) -> Gradients:
    lse = widen(given["logsumexp"])
    return attention.backward(widen(grad_out), widen(given["out"]), lse)


# --- the ops that scaled_dot_product_attention picks on accelerators ------------------------------------------------


def sdp_flash(given: Given) -> tuple[Any, ...]:
    """FlashAttention-2: causal is aligned bottom right (flash_attn/mask.h).

    scaled_dot_product_attention picks it for causal attention only where queries and keys are as many.
    """
    query = given["query"]
    out, lse = _attention(given, bottom_right=True).forward()
    seed, unused = _flash_random(query)
    debug = query.new_empty(0, dtype=torch.float64)
    return _laid_out_like(out, query), lse, None, None, query.shape[2], given["key"].shape[2], seed, unused, debug


def _flash_random(query: Tensor) -> tuple[Tensor, Tensor]:
    if torch.version.hip:
        return _philox(query)
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return state, torch.zeros((), dtype=torch.uint64, device=query.device)


def sdp_flash_backward(given: Given) -> tuple[Any, ...]:
    """Return dQ, dK, dV."""
    found = _backward(_attention(given, bottom_right=True), given, given["grad_out"])
    return found.query, found.key, found.value


def _padded_lse(lse: Tensor, *, wanted: bool) -> Tensor:
    """Memory-efficient attention pads the rows of L to a multiple of 32, on NVIDIA, with +inf: exp(S - L) is 0."""
    if not wanted:
        return lse[..., :0]
    width = lse.shape[-1]
    more = 0 if torch.version.hip else -width % 32
    return torch.nn.functional.pad(lse, (0, more), value=math.inf)


def sdp_efficient(given: Given) -> tuple[Any, ...]:
    """Causal is aligned top left (attention.cu: CustomMaskType::CausalFromTopLeft)."""
    out, lse = _attention(given, bias="attn_bias").forward()
    return _tokens_second(out), _padded_lse(lse, wanted=given["compute_log_sumexp"]), *_philox(given["query"])


def sdp_efficient_backward(given: Given) -> tuple[Any, ...]:
    """Return dQ, dK, dV and dbias, None unless `grad_input_mask` requests it; L comes padded."""
    attention = _attention(given, bias="attn_bias")
    lse = widen(given["logsumexp"])[..., : attention.query.shape[-2]]
    found = attention.backward(widen(given["grad_out_"]), widen(given["out"]), lse)
    return found.query, found.key, found.value, found.bias if given["grad_input_mask"][3] else None


def sdp_cudnn(given: Given) -> tuple[Any, ...]:
    """Causal is aligned top left (MHA.cpp: set_causal_mask); L is `[batch, heads, tokens, 1]`."""
    query = given["query"]
    out, lse = _attention(given, bias="attn_bias").forward()
    counts = query.shape[2], given["key"].shape[2]
    return _laid_out_like(out, query), lse.unsqueeze(-1), None, None, *counts, *_philox(query), None


def sdp_cudnn_backward(given: Given) -> tuple[Any, ...]:
    """Return dQ, dK, dV; a bias gets no gradient."""
    attention = _attention(given, bias="attn_bias")
    lse = widen(given["logsumexp"]).reshape(attention.query.shape[:-1])
    found = attention.backward(widen(given["grad_out"]), widen(given["out"]), lse)
    return found.query, found.key, found.value


def sdp_overrideable(given: Given) -> tuple[Any, ...]:
    """The op for other accelerators: the formula of `scaled_dot_product_attention`, causal aligned top left."""
    query = given["query"]
    out, lse = _attention(given, bias="attn_bias").forward()
    counts = query.shape[2], given["key"].shape[2]
    return _laid_out_like(out, query), lse, None, None, *counts, *_philox(query), None


def sdp_overrideable_backward(given: Given) -> tuple[Any, ...]:
    """Return dQ, dK, dV and dbias, None unless `grad_input_mask` requests it."""
    found = _backward(_attention(given, bias="attn_bias"), given, given["grad_out"])
    return found.query, found.key, found.value, found.bias if given["grad_input_mask"][3] else None


# --- the ops below them, which programs also call -------------------------------------------------------------------


def _offsets(cumulative: Tensor | None, count: int) -> list[tuple[int, int]]:
    """Start and stop of each sequence: `cumulative` holds `[0, n1, n1 + n2, …]`; one whole without it."""
    if cumulative is None:
        return [(0, count)]
    return list(itertools.pairwise(cumulative.tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    """Packed sequences; a batch of equally long ones is a single piece.

    Attributes:
        pieces: For each sequence: start and stop of its queries and of its keys, and its attention.
    """

    pieces: tuple[tuple[tuple[int, int], tuple[int, int], Attention], ...]

    @classmethod
    def of(
        cls, given: Given, offsets: tuple[Tensor | None, Tensor | None], attend: Callable[[Given], Attention]
    ) -> _Packed:
        """Cut `[batch, tokens, heads, size]` at the offsets of queries and of keys."""
        rows = _offsets(offsets[0], given["query"].shape[1])
        columns = _offsets(offsets[1], given["key"].shape[1])
        pieces = []
        for (q0, q1), (k0, k1) in zip(rows, columns, strict=True):
            own = {
                **given,
                "query": given["query"][:, q0:q1],
                "key": given["key"][:, k0:k1],
                "value": given["value"][:, k0:k1],
            }
            pieces.append(((q0, q1), (k0, k1), attend(own)))
        return cls(pieces=tuple(pieces))

    def forward(self) -> tuple[Tensor, list[Tensor]]:
        """Return O `[batch, tokens, heads, size]` and L of each sequence `[batch, heads, its tokens]`."""
        found = [attention.forward() for _, _, attention in self.pieces]
        return torch.cat([out.transpose(1, 2) for out, _ in found], dim=1), [lse for _, lse in found]

    def backward(self, given: Given, grad_out: Tensor, lse: list[Tensor]) -> Gradients:
        """Return gradients in the layout `[batch, tokens, heads, size]`."""
        query, key, value = (torch.zeros_like(widen(given[name])) for name in ("query", "key", "value"))
        bias = None
        for ((q0, q1), (k0, k1), attention), own in zip(self.pieces, lse, strict=True):
            one, out = (widen(tensor)[:, q0:q1].transpose(1, 2) for tensor in (grad_out, given["out"]))
            found = attention.backward(one, out, own)
            query[:, q0:q1] = found.query.transpose(1, 2)
            key[:, k0:k1] += found.key.transpose(1, 2)
            value[:, k0:k1] += found.value.transpose(1, 2)
            bias = found.bias
        return Gradients(query=query, key=key, value=value, bias=bias)


def _flash_attention(given: Given) -> Attention:
    """Causal, and a window around the diagonal, are aligned bottom right (flash_attn/mask.h).

    Query i sees the keys from i + N - M - left to i + N - M + right; -1 and None are no bound.
    """
    attention = _attention(given, heads_second=False)
    shift = attention.key.shape[-2] - attention.query.shape[-2]
    left, right = (given.get(f"window_size_{side}") for side in ("left", "right"))
    right = 0 if given["is_causal"] else right
    return attention.within(
        lowest=None if left is None or left < 0 else shift - left,
        highest=None if right is None or right < 0 else shift + right,
    )


def _flash_packed(given: Given) -> tuple[Given, _Packed, bool]:
    """`[batch, tokens, heads, size]`, or with offsets `[all tokens, heads, size]`."""
    packed = given["cum_seq_q"] is not None and given["query"].dim() == 3
    if packed:
        named = ("query", "key", "value", "grad_out", "out")
        given = {**given, **{name: given[name].unsqueeze(0) for name in named if name in given}}
    offsets = (given["cum_seq_q"], given["cum_seq_k"]) if packed else (None, None)
    return given, _Packed.of(given, offsets, _flash_attention), packed


def flash_forward(given: Given) -> tuple[Any, ...]:
    """L is `[batch, heads, tokens]`, with offsets `[heads, all tokens]`."""
    query = given["query"]
    _, sequences, packed = _flash_packed(given)
    out, lse = sequences.forward()
    if packed:
        out, lse = out.squeeze(0), [torch.cat(lse, dim=-1).squeeze(0)]
    return _laid_out_like(out, query), lse[0], *_flash_random(query), query.new_empty(0, dtype=torch.float64)


def flash_backward(given: Given) -> tuple[Any, ...]:
    """Return dQ, dK, dV in the layout of the arguments."""
    wide, sequences, packed = _flash_packed(given)
    lse = widen(given["logsumexp"])
    own = [lse[None, :, q0:q1] for (q0, q1), _, _ in sequences.pieces] if packed else [lse]
    found = sequences.backward(wide, wide["grad_out"], own)
    gradients = found.query, found.key, found.value
    return tuple(gradient.squeeze(0) for gradient in gradients) if packed else gradients


def _efficient_attention(given: Given) -> Attention:
    """`custom_mask_type`: 0 none, 1 causal from the top left, 2 causal from the bottom right (kernel_forward.h).

    With `window_size` w a query sees the last w keys up to its diagonal.
    """
    attention = _attention(given, bias="bias", heads_second=False)
    kind, window = given["custom_mask_type"], given.get("window_size")
    shift = attention.key.shape[-2] - attention.query.shape[-2] if kind == 2 else 0
    return attention.within(
        lowest=shift - window + 1 if window else None,
        highest=shift if kind else None,
    )


def efficient_forward(given: Given) -> tuple[Any, ...]:
    """L is `[sequences, heads, longest]`, padded to a multiple of 32."""
    sequences = _Packed.of(given, (given["cu_seqlens_q"], given["cu_seqlens_k"]), _efficient_attention)
    out, lse = sequences.forward()
    longest = [given[name] for name in ("max_seqlen_q", "max_seqlen_k")]
    longest = [
        given[name].shape[1] if size is None else size for name, size in zip(("query", "key"), longest, strict=True)
    ]
    rows = [torch.nn.functional.pad(one, (0, longest[0] - one.shape[-1]), value=math.inf) for one in lse]
    whole = _padded_lse(torch.cat(rows), wanted=given["compute_log_sumexp"])
    return out, whole, *_philox(given["query"]), *longest


def efficient_backward(given: Given) -> tuple[Any, ...]:
    """Return dQ, dK, dV and dbias, which is None if not requested."""
    sequences = _Packed.of(given, (given["cu_seqlens_q"], given["cu_seqlens_k"]), _efficient_attention)
    lse = widen(given["logsumexp"])
    packed = given["cu_seqlens_q"] is not None
    own = [
        (lse[place : place + 1] if packed else lse)[..., : q1 - q0]
        for place, ((q0, q1), _, _) in enumerate(sequences.pieces)
    ]
    found = sequences.backward(given, given["grad_out_"], own)
    bias = found.bias if given["bias_requires_grad"] else None
    return found.query, found.key, found.value, bias
