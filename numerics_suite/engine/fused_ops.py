"""The fused attention ops that both references compute by formula, forward and backward, and never run.

The flash, memory-efficient and cuDNN ops of CUDA have no float64 kernel. The flash op of the CPU has one, but a defect
in it would be in the reference too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from numerics_suite.devices.device import has_float64
from numerics_suite.devices.kinds import CPU
from numerics_suite.engine import attention_ops
from numerics_suite.engine.calls import to_device
from numerics_suite.observations.roundoff import unit_roundoff

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numerics_suite.engine.reference_ops import LeanMode

    Given = Mapping[str, Any]

_ATEN: Final = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Formula:
    """What an op computes.

    Attributes:
        compute: From the op's arguments by name, in any float, to its results, floats in float64.
        like: For each result the argument whose dtype it has, "lse" for a log-sum-exp, "" for one that is no float.
        unsupported: Names of arguments that must be None: the formula does not know what they do.
    """

    compute: Callable[[Given], tuple[Any, ...]]
    like: tuple[str, ...]
    unsupported: tuple[str, ...] = ()

    def refusal(self, given: Given) -> str:
        """Return why the formula does not cover these arguments, "" if it does."""
        if given["dropout_p"] > 0:
            return f"dropout {given['dropout_p']:g}"  # which numbers a kernel draws is its own affair
        if given["query"].is_nested:
            return "nested tensors"
        if given.get("return_debug_mask"):
            return "return_debug_mask"
        if given.get("cu_seqlens_q") is not None and given["bias"] is not None:
            return "a bias over packed sequences"
        return next((name for name in self.unsupported if given.get(name) is not None), "")

    def dtypes(self, given: Given) -> tuple[torch.dtype | None, ...]:
        """Return the dtype that the op gives each result; None for one that is no float.

        No kernel runs for it: the tensors' device may have none. Log-sum-exps are float32 of every lower
        float, as in torch's meta kernels.
        """
        lse = torch.float64 if given["query"].dtype is torch.float64 else torch.float32
        floats = [
            lse if name == "lse" else given[name].dtype if given.get(name) is not None else lse for name in self.like
        ]
        return tuple(dtype if name else None for name, dtype in zip(self.like, floats, strict=True))


def bind(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of the overload `func` by name, defaults included."""
    given = {}
    for place, argument in enumerate(func._schema.arguments):  # noqa: SLF001 - the only way to the schema
        if place < len(args):
            given[argument.name] = args[place]
        elif argument.name in kwargs:
            given[argument.name] = kwargs[argument.name]
        else:
            given[argument.name] = argument.default_value
    return given


def formula_for(
    mode: LeanMode, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Formula, dict[str, Any]] | None:
    """Return the formula of `func` and its arguments by name; None for any other op.

    Also None for a call that the formula does not cover, such as one with dropout; `mode` then records op and reason.
    """
    formula = _BY_ID.get(id(func))
    if formula is None:
        return None
    given = bind(func, args, kwargs)
    reason = formula.refusal(given)
    if reason:
        mode.leave_out(f"{func} with {reason}")
        return None
    return formula, given


def rounded(results: tuple[Any, ...], dtypes: Sequence[torch.dtype | None]) -> tuple[Any, ...]:
    """Round each float once to its dtype."""
    return tuple(
        value if dtype is None or not isinstance(value, Tensor) else value.to(dtype)
        for value, dtype in zip(results, dtypes, strict=True)
    )


_QKV: Final = ("query", "key", "value")
_SDP: Final = ("query", "lse", "", "", "", "", "", "")
_BY_NAME: Final = {
    "_scaled_dot_product_flash_attention_for_cpu": Formula(compute=attention_ops.flash_cpu, like=("query", "lse")),
    "_scaled_dot_product_flash_attention_for_cpu_backward": Formula(
        compute=attention_ops.flash_cpu_backward, like=_QKV
    ),
    "_scaled_dot_product_flash_attention": Formula(compute=attention_ops.sdp_flash, like=(*_SDP, "query")),
    "_scaled_dot_product_flash_attention_backward": Formula(compute=attention_ops.sdp_flash_backward, like=_QKV),
    "_scaled_dot_product_efficient_attention": Formula(
        compute=attention_ops.sdp_efficient, like=("query", "lse", "", "")
    ),
    "_scaled_dot_product_efficient_attention_backward": Formula(
        compute=attention_ops.sdp_efficient_backward, like=(*_QKV, "attn_bias")
    ),
    "_scaled_dot_product_cudnn_attention": Formula(compute=attention_ops.sdp_cudnn, like=(*_SDP, "")),
    "_scaled_dot_product_cudnn_attention_backward": Formula(compute=attention_ops.sdp_cudnn_backward, like=_QKV),
    "_cudnn_attention_forward": Formula(
        compute=attention_ops.sdp_cudnn, like=(*_SDP, ""), unsupported=("cum_seq_q", "cum_seq_k")
    ),
    "_cudnn_attention_backward": Formula(
        compute=attention_ops.sdp_cudnn_backward, like=_QKV, unsupported=("cum_seq_q", "cum_seq_k")
    ),
    "_scaled_dot_product_fused_attention_overrideable": Formula(
        compute=attention_ops.sdp_overrideable, like=(*_SDP, "")
    ),
    "_scaled_dot_product_fused_attention_overrideable_backward": Formula(
        compute=attention_ops.sdp_overrideable_backward, like=(*_QKV, "attn_bias")
    ),
    "_flash_attention_forward": Formula(
        compute=attention_ops.flash_forward,
        like=("query", "lse", "", "", "query"),
        unsupported=("seqused_k", "alibi_slopes", "block_table"),
    ),
    "_flash_attention_backward": Formula(compute=attention_ops.flash_backward, like=_QKV),
    "_efficient_attention_forward": Formula(
        compute=attention_ops.efficient_forward, like=("query", "lse", "", "", "", ""), unsupported=("seqlen_k",)
    ),
    "_efficient_attention_backward": Formula(compute=attention_ops.efficient_backward, like=(*_QKV, "bias")),
}

FORMULAS: Final[dict[Any, Formula]] = {
    getattr(_ATEN, name).default: formula for name, formula in _BY_NAME.items() if hasattr(_ATEN, name)
}
"""Op overload → what it computes. An older torch without an op has no entry for it."""

_BY_ID: Final = {id(func): formula for func, formula in FORMULAS.items()}
"""The same by id: an op is hashed in Python, and every op of a run is looked up."""


def excess_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: Sequence[Any]) -> float:
    """Return how far a kernel's first result is from its formula, in units of one rounding of it.

    NaN for a call that the formula does not cover.
    """
    got: Tensor = results[0]
    if not has_float64(got.device):
        got, args, kwargs = to_device((got, tuple(args), dict(kwargs)), CPU)
    formula, given = FORMULAS[func], bind(func, args, kwargs)
    if formula.refusal(given):
        return math.nan
    want, dtype = formula.compute(given)[0], given[formula.like[0]].dtype
    once = want.to(dtype).double()
    scale = max(float((once - want).norm()), 12**-0.5 * unit_roundoff(dtype) * float(want.norm()))
    error = float((got.double() - want).norm())
    if error != error:
        return math.inf if scale == scale else math.nan
    return error / scale if scale else math.inf if error else 0.0
