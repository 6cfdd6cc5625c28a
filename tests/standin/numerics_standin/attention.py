"""Scaled dot product attention as one fused op, forward and backward.

PyTorch asks a table in C++ which attention kernel a device has, and Python cannot enter one there. So
`scaled_dot_product_attention` itself is registered for the device, makes CUDA's choice and calls
`_scaled_dot_product_fused_attention_overrideable`, the op that PyTorch keeps for other devices' fused kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from numerics_standin import random_state
from numerics_standin.memory import NAME
from numerics_standin.switches import switches

aten = torch.ops.aten
_SDPA = aten.scaled_dot_product_attention.default
_FUSED = aten._scaled_dot_product_fused_attention_overrideable.default
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _is_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused kernel can compute it: CUDA's conditions, without those on alignment and head size."""
    return (
        torch._C._get_overrideable_sdp_enabled()
        and (torch._C._get_flash_sdp_enabled() or torch._C._get_mem_efficient_sdp_enabled())
        and query.dim() == key.dim() == value.dim() == 4
        and query.dtype in _FUSED_DTYPES
        and query.dtype is key.dtype is value.dtype
        and (mask is None or mask.dtype in (torch.bool, query.dtype))
        and key.shape[-2] > 0
        and query.shape[-2] > 0
    )


def scaled_dot_product_attention(  # noqa: PLR0917 - PyTorch's signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Choose between the fused op and PyTorch's composition of simple ops."""
    if not _is_fused(query, key, value, attn_mask):
        return _SDPA._op_dk(
            _COMPOSITE, query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    if is_causal and attn_mask is not None:
        message = "_scaled_dot_product_attention: Explicit attn_mask should not be set when is_causal=True"
        raise RuntimeError(message)
    if enable_gqa and key.shape[1] != query.shape[1]:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return _FUSED(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)[0]


def _decomposed(*args: Any, **kwargs: Any) -> Tensor:
    """What `decompose()` of the op runs: dispatch modes that take the op apart must find the fused one, too."""
    query = args[0] if args else kwargs["query"]
    if query.device.type == NAME:
        return scaled_dot_product_attention(*args, **kwargs)
    return _SDPA._op_dk(_COMPOSITE, *args, **kwargs)


def _check(query: Tensor) -> None:
    if query.dtype not in _FUSED_DTYPES:
        name = {torch.float64: "Double"}.get(query.dtype, str(query.dtype))
        message = f"expected scalar type Float, Half or BFloat16 but found {name}"
        raise RuntimeError(message)


def _probabilities(
    query: Tensor, key: Tensor, bias: Tensor | None, is_causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Return the attention probabilities and the logarithms of their sums, float32; a row without a key is 0."""
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = query.float() @ key.float().transpose(-2, -1) * factor
    if bias is not None:
        scores = scores + bias.float()
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(allowed.logical_not(), -math.inf)
    sums = scores.logsumexp(-1)
    probabilities = (scores - sums.unsqueeze(-1)).exp()
    return probabilities.masked_fill(sums.isneginf().unsqueeze(-1), 0.0), sums


def _dropout_factor(shape: Any, dropout_p: float, seed: int) -> Tensor:
    generator = random_state._CpuGenerator(device="cpu").manual_seed(seed)
    kept = torch.rand(shape, generator=generator, device="cpu") >= dropout_p
    return kept.float() / (1 - dropout_p)


def _noisy(result: Tensor) -> Tensor:
    """Make a result wrong as far as the switch says, the same in each run."""
    if not switches.fused_noise:
        return result
    generator = random_state._CpuGenerator(device="cpu").manual_seed(0)
    noise = torch.rand(result.shape, generator=generator, device="cpu") * 2 - 1
    return (result * (1 + switches.fused_noise * noise)).to(result.dtype)


def forward_on_host(  # noqa: PLR0917 - PyTorch's signature
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    seed: int = 0,
) -> tuple[Any, ...]:
    """Compute as flash attention does: products and softmax in float32, rounded once."""
    _check(query)
    probabilities, sums = _probabilities(query, key, attn_bias, is_causal, scale)
    if dropout_p > 0:
        probabilities = probabilities * _dropout_factor(probabilities.shape, dropout_p, seed)
    # The layout of flash attention's results: [batch, query, heads, size] in memory, so that heads join as a view.
    output = (probabilities @ value.float()).to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    empty = torch.empty(0, dtype=torch.int32, device="cpu")
    seeds = torch.tensor(seed, dtype=torch.int64, device="cpu")
    return (
        _noisy(output),
        sums,
        empty,
        empty.clone(),
        query.shape[-2],
        key.shape[-2],
        seeds,
        torch.zeros((), dtype=torch.int64, device="cpu"),
        torch.empty(0, dtype=query.dtype, device="cpu"),
    )


def backward_on_host(  # noqa: PLR0917 - PyTorch's signature
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    grad_input_mask: list[bool],
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    """Differentiate `forward_on_host`: recompute the probabilities P, then dS = P ∘ (dP − rowsum(P ∘ dP))."""
    _check(query)
    bias = attn_bias if attn_bias is not None and attn_bias.numel() else None
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    probabilities, _ = _probabilities(query, key, bias, is_causal, scale)
    grad = grad_out.float()
    kept = _dropout_factor(probabilities.shape, dropout_p, int(philox_seed)) if dropout_p > 0 else None
    grad_value = (probabilities if kept is None else probabilities * kept).transpose(-2, -1) @ grad
    grad_probabilities = grad @ value.float().transpose(-2, -1)
    if kept is not None:
        grad_probabilities = grad_probabilities * kept
    grad_scores = probabilities * (grad_probabilities - (probabilities * grad_probabilities).sum(-1, keepdim=True))
    grads = (
        (grad_scores @ key.float() * factor).to(query.dtype),
        (grad_scores.transpose(-2, -1) @ query.float() * factor).to(key.dtype),
        grad_value.to(value.dtype),
        None if bias is None else grad_scores.to(bias.dtype),
    )
    # PyTorch's binding has no undefined tensor in a tuple of results; an empty one stands for a gradient not asked for.
    return tuple(
        _noisy(gradient) if wanted and gradient is not None else torch.empty(0, dtype=query.dtype, device="cpu")
        for gradient, wanted in zip(grads, grad_input_mask, strict=True)
    )


def register(library: torch.library.Library, on_host: Any) -> None:
    """Register the choice and the fused op.

    Args:
        library: Where to.
        on_host: Makes a device kernel of a function of CPU tensors.
    """
    for key in ("PrivateUse1", "AutogradPrivateUse1"):
        library.impl("scaled_dot_product_attention", scaled_dot_product_attention, key)
    _SDPA.py_impl(_COMPOSITE)(_decomposed)
    forward = on_host(_FUSED, _seeded_forward, index_first=True)
    library.impl("_scaled_dot_product_fused_attention_overrideable", forward, "PrivateUse1")
    backward = aten._scaled_dot_product_fused_attention_overrideable_backward.default
    library.impl(
        "_scaled_dot_product_fused_attention_overrideable_backward", on_host(backward, backward_on_host), "PrivateUse1"
    )


def _seeded_forward(index: int, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    dropout_p = args[4] if len(args) > 4 else 0.0
    seed = 0
    if dropout_p > 0:
        drawn = torch.empty((), dtype=torch.int64, device="cpu")
        seed = int(drawn.random_(generator=random_state.default_generators[index]))
    return forward_on_host(*args, **kwargs, seed=seed)
