"""Switches off every dropout, whether a module, a function or an argument of attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

IDENTITIES: frozenset[Any] = frozenset(
    getattr(owner, name)
    for owner in (functional, torch)
    for name in (
        *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "alpha_dropout_"),
        *("feature_dropout", "feature_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_"),
    )
    if hasattr(owner, name)
)
"""The functions that are their first argument where nothing is dropped."""


class WithoutDropout(TorchFunctionMode):
    """Training mode without its randomness: dropout returns its input, and attention drops nothing.

    Disabling `nn.Dropout` is not enough: GPT-2's attention passes on a module's probability, and OPT's layers call
    `functional.dropout` with a number of their own.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` with nothing dropped."""
        given: Mapping[str, Any] = kwargs or {}
        if func in IDENTITIES:
            return args[0] if args else given["input"]
        if func is functional.scaled_dot_product_attention:
            # query, key, value, attn_mask, dropout_p, …
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            given = {name: value for name, value in given.items() if name != "dropout_p"}
        elif func is functional.multi_head_attention_forward:
            bound = inspect.signature(func).bind(*args, **given)
            bound.arguments["dropout_p"] = 0.0
            args, given = bound.args, bound.kwargs
        return func(*args, **given)
