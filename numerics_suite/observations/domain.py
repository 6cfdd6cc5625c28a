"""Explains an op's output by its inputs: an intended infinity, an argument outside the domain, a fully masked row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from numerics_suite.observations.finiteness import nonfinite_count

FILLS = frozenset({"_to_copy", "copy_", "full", "full_like", "fill", "fill_", "masked_fill", "masked_fill_", "where"})
"""Ops that fill in a value; an -inf of theirs belongs to a mask."""

DIVISORS = {"div": 1, "div_": 1, "reciprocal": 0, "rsqrt": 0, "rsqrt_": 0, "addcdiv": 2, "addcdiv_": 2}
"""By op: which argument must not be zero."""

OUTSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    **dict.fromkeys(("log", "log2", "log10"), lambda x: x <= 0),
    "log1p": lambda x: x <= -1,
    **dict.fromkeys(("sqrt", "rsqrt"), lambda x: x < 0),
    **dict.fromkeys(("asin", "acos"), lambda x: x.abs() > 1),
}
"""By op: the elements that have no root, logarithm or angle."""


def name_of(func: Any) -> str:
    """`rsqrt` of `aten.rsqrt.default`."""
    return str(func).split(".")[1]


def means_infinity(func: Any, before: Any, inputs: list[Tensor]) -> bool:
    """Whether an -inf in the output comes from a mask: filled in, passed on, or below the dtype's lowest number.

    Args:
        func: the op.
        before: its arguments.
        inputs: the floating tensors among them.
    """
    if name_of(func) in FILLS or not inputs:
        return True
    least = max(torch.finfo(leaf.dtype).min for leaf in inputs)
    scalars = (leaf for leaf in tree_leaves(before) if isinstance(leaf, float))
    if any(value <= least for value in scalars):
        return True
    # A mask of the dtype's least number becomes -inf where a score is added to it.
    return any(leaf.numel() > 0 and bool((leaf <= torch.finfo(leaf.dtype).min).any()) for leaf in inputs)


def is_outside_domain(func: Any, before: Any) -> bool:
    """Whether the op divides by zero, or takes a root or logarithm of a number that has none.

    Args:
        func: the op.
        before: its arguments, as `(args, kwargs)`.
    """
    args, name = before[0], name_of(func)
    if name in DIVISORS and len(args) > DIVISORS[name] and _any_zero(args[DIVISORS[name]]):
        return True
    if not args or not isinstance(args[0], Tensor):
        return False
    if name == "pow":
        return len(args) > 1 and isinstance(args[1], (int, float)) and args[1] < 0 and _any_zero(args[0])
    outside = OUTSIDE.get(name.removesuffix("_"))
    return outside is not None and bool(outside(args[0]).any())


def _any_zero(value: object) -> bool:
    if isinstance(value, Tensor):
        return bool((value == 0).any())
    return isinstance(value, (int, float)) and value == 0


def has_masked_row(func: Any, before: Any, inputs: list[Tensor]) -> bool:
    """Whether a row of scores, or of a mask that a fused attention takes, allows no key at all.

    Args:
        func: the op.
        before: its arguments.
        inputs: the floating tensors among them.
    """
    if any(_all_minus_infinity(leaf) for leaf in inputs):
        return True
    if "attention" not in name_of(func):
        return False
    masks = (leaf for leaf in tree_leaves(before) if isinstance(leaf, Tensor) and leaf.dtype == torch.bool)
    return any(bool((~leaf).all(dim=-1).any()) for leaf in masks if leaf.dim())


def _all_minus_infinity(tensor: Tensor) -> bool:
    if tensor.dim() == 0 or tensor.shape[-1] == 0 or not nonfinite_count(tensor):
        return False
    return bool((tensor == float("-inf")).all(dim=-1).any())
