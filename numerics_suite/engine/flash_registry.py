"""FlashAttention as transformers calls it, replaced by a formula while a reference runs.

The kernels of the flash-attn package and of the Hub take 16-bit floats on an accelerator only, and a dispatch mode
cannot see what they do. While a reference runs, transformers' registry holds a function instead that does what its
`_flash_attention_forward` does around the kernel (the cast to 16 bits, the removal of padding, packed sequences) and
calls `aten._flash_attention_forward` instead, which computes the same and whose formula both references know. The
model's configuration stays as it is, so it still builds the masks of FlashAttention.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.devices.arithmetic import autocast_dtypes
from numerics_suite.engine.module_tree import configs_of, modules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableMapping

_UNKNOWN: Final = ("softcap", "s_aux", "block_table", "k_cache", "v_cache")
"""Arguments that `aten._flash_attention_forward` has no counterpart of."""


@contextmanager
def visible_attention(model: nn.Module) -> Iterator[None]:
    """Make the attention of `model` visible to a dispatch mode: no compiled code, no hidden kernel."""
    with ExitStack() as stack:
        stack.enter_context(uncompiled_flex_attention(model))
        if "torch._dynamo" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(flash_attention_by_formula(model))
        yield


@contextmanager
def uncompiled_flex_attention(model: nn.Module) -> Iterator[None]:
    """Run flex attention without a compiler, which cannot trace it under a dispatch mode; other models as they are."""
    configs = configs_of(modules_of(model))
    # transformers compiles it at its first call, so torch._dynamo may not be there yet.
    if any(getattr(config, "_attn_implementation", None) == "flex_attention" for config in configs):
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextmanager
def flash_attention_by_formula(model: nn.Module) -> Iterator[None]:
    """Replace every FlashAttention kernel that `model` finds in transformers by the formula; restored on exit."""
    with ExitStack() as stack:
        for registry in _registries():
            for name in [name for name, function in registry.items() if _is_flash(name, function)]:
                stack.enter_context(_entry(registry, name, registered_attention))
        for namespace in _namespaces(model):
            stack.enter_context(_entry(namespace, "_flash_attention_forward", called_attention))
        yield


def _registries() -> Iterator[MutableMapping[str, Any]]:
    """Yield the registries of attention functions, from transformers 4.48 on, without importing anything."""
    functions = getattr(sys.modules.get("transformers.modeling_utils"), "ALL_ATTENTION_FUNCTIONS", None)
    if isinstance(functions, dict):  # 4.48 and 4.49
        yield functions
    elif functions is not None:
        yield from (vars(functions)["_local_mapping"], type(functions)._global_mapping)  # noqa: SLF001


def _namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """Return the modelling modules that call the kernel from a class of their own, as all do before 4.48."""
    names = dict.fromkeys(type(module).__module__ for module in modules_of(model))
    found = [vars(sys.modules[name]) for name in names if name in sys.modules]
    return [namespace for namespace in found if "_flash_attention_forward" in namespace]


def _is_flash(name: str, function: Any) -> bool:
    """Whether an entry is transformers' FlashAttention; a kernel of the Hub has its repository's name."""
    while isinstance(function, partial):
        function = function.func
    return name.startswith("flash_attention_") or getattr(function, "__name__", "") == "flash_attention_forward"


@contextmanager
def _entry(mapping: MutableMapping[str, Any], name: str, value: object) -> Iterator[None]:
    before = mapping[name]
    mapping[name] = value
    try:
        yield
    finally:
        mapping[name] = before


def registered_attention(  # noqa: PLR0913, PLR0917 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,  # noqa: FBT001 - transformers' signature
    **others: Any,
) -> tuple[Tensor, None]:
    """Stand in for `transformers.integrations.flash_attention.flash_attention_forward`.

    Args:
        module: The attention module.
        query: `[batch, heads, M, size]`.
        key: `[batch, key heads, N, size]`.
        value: `[batch, key heads, N, size]`.
        attention_mask: 1 for a real token, `[batch, N]`; None where all are.
        dropout: Must be 0.
        scaling: What products are multiplied by; None: 1 / sqrt(size).
        sliding_window: Most keys that a query sees, itself included.
        is_causal: None: as the module says.
        others: `position_ids` and `cu_seq_lens_q`, `cu_seq_lens_k` for packed sequences; the rest of what kernels take.

    Returns:
        `[batch, M, heads, size]` and None for the weights.
    """
    query, key, value = (_in_16_bits(tensor.transpose(1, 2), module) for tensor in (query, key, value))
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    keywords = {"dropout": dropout, "softmax_scale": scaling, "sliding_window": sliding_window, **others}
    return called_attention(query, key, value, attention_mask, query.shape[1], causal, **keywords), None


def _in_16_bits(tensor: Tensor, module: nn.Module) -> Tensor:
    """Cast float32 as transformers does for a kernel that takes 16 bits only: autocast's float, else the weights'."""
    if tensor.dtype is not torch.float32:
        return tensor
    if section := autocast_dtypes(tensor.device).get(tensor.device.type):
        return tensor.to(section)
    weight = next((part.weight for part in module.modules() if isinstance(part, nn.Linear)), tensor)
    return tensor.to(weight.dtype)


def called_attention(  # noqa: PLR0913, PLR0917 - transformers' signature
    query_states: Tensor,
    key_states: Tensor,
    value_states: Tensor,
    attention_mask: Tensor | None,
    query_length: int,
    is_causal: bool,  # noqa: FBT001 - transformers' signature
    dropout: float = 0.0,
    position_ids: Tensor | None = None,
    softmax_scale: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> Tensor:
    """Stand in for `transformers.modeling_flash_attention_utils._flash_attention_forward`.

    All tensors are `[batch, tokens, heads, size]`; the other arguments are those of `registered_attention`.

    Raises:
        NotApplicableError: An argument needs what the formula does not support, such as dropout; the reason names it.
    """
    asked = [name for name in _UNKNOWN if others.get(name) is not None]
    if dropout > 0 or asked:
        what = "dropout" if dropout > 0 else asked[0]
        reason = f"no float64 reference: flash_attention with {what} cannot be computed in float64"
        raise NotApplicableError(reason)
    attend = partial(_attend, scale=softmax_scale, causal=is_causal, window=sliding_window)
    if attention_mask is not None:
        return _without_padding(attend, query_states, key_states, value_states, attention_mask)
    offsets = others.get("cu_seq_lens_q"), others.get("cu_seq_lens_k")
    if None in offsets and _is_packed(position_ids, query_states.shape[0], query_length):
        offsets = (_restarts(position_ids),) * 2  # type: ignore[arg-type]
    if None in offsets:
        return attend(query_states, key_states, value_states)
    flat = (tensor.flatten(0, 1) for tensor in (query_states, key_states, value_states))
    return attend(*flat, offsets=offsets).view_as(query_states)


def _attend(  # noqa: PLR0913 - the arguments of an op
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
    offsets: tuple[Any, Any] = (None, None),
) -> Tensor:
    """Call the op; with offsets `[all tokens, heads, size]`."""
    longest = [
        size.shape[1] if edges is None else int(edges.diff().max())
        for size, edges in zip((query, key), offsets, strict=True)
    ]
    # transformers counts a window with the query itself, FlashAttention without it.
    reach = window - 1 if window is not None and longest[1] > window else None
    found = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - has no public name
        query, key, value, *offsets, *longest, 0.0, causal, False,
        scale=scale, window_size_left=reach, window_size_right=reach,
    )  # fmt: skip
    out = found[0]
    assert isinstance(out, Tensor)
    return out


def _without_padding(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attend among the real tokens of each row; the output of padding is 0, as `pad_input` leaves it."""
    batch, count, heads, size = query.shape
    key, value = (tensor[:, : mask.shape[1]] for tensor in (key, value))  # a static cache is longer than the mask
    real = mask.bool()
    # One query a row is always real; several fewer than keys are the last ones, so padding must be on the left.
    asking = torch.ones_like(real[:, :1]) if count == 1 else real[:, -count:]
    rows, columns = asking.flatten().nonzero().squeeze(1), real.flatten().nonzero().squeeze(1)
    flat = query.flatten(0, 1)[rows], key.flatten(0, 1)[columns], value.flatten(0, 1)[columns]
    out = attend(*flat, offsets=(_edges(asking.sum(dim=1)), _edges(real.sum(dim=1))))
    return out.new_zeros(batch * count, heads, size).index_copy(0, rows, out).view(batch, count, heads, size)


def _edges(lengths: Tensor) -> Tensor:
    """`[0, n1, n1 + n2, …]`, int32."""
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _is_packed(position_ids: Tensor | None, batch: int, count: int) -> bool:
    """Whether one row holds several sequences: its positions start again."""
    if position_ids is None or batch != 1 or count == 1 or position_ids.shape[-1] != count:
        return False
    return not bool((position_ids.reshape(-1).diff() == 1).all())


def _restarts(position_ids: Tensor) -> Tensor:
    """Offsets of sequences whose positions all start at the same number."""
    flat = position_ids.reshape(-1)
    starts = (flat == flat.min()).nonzero().squeeze(1)
    return nn.functional.pad(starts, (0, 1), value=flat.numel()).to(torch.int32)
