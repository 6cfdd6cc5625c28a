"""Which way round a model holds its states: `[batch, sequence, …]`, or `[sequence, batch, …]` as ChatGLM's first code does.

Shapes alone are ambiguous if a batch has as many rows as tokens, so one row of three tokens is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from numerics_suite.engine.calls import call_model
from numerics_suite.engine.true_fp64 import run_true_fp64

STATES = "hidden_states"
"""Key of the states that the model itself returns; other keys are module paths."""

INPUT = ":input"
"""Suffix of a module's path for its input; the bare path is its output."""

_TOKENS = 3


def sequence_first(model: nn.Module, **keywords: Any) -> frozenset[str]:
    """Where the model holds states as `[sequence, batch, …]`, from one true fp64 run of one row of three tokens.

    Args:
        model: takes `input_ids`; left as it was.
        keywords: of the call; with `output_hidden_states` the model's own states are looked at too.

    Returns:
        Module paths, `PATH:input` for what a module is given, and :data:`STATES` for the model's own `hidden_states`.
    """
    found: set[str] = set()

    def note(name: str, value: Any) -> None:
        if _is_sequence_first(value):
            found.add(name)

    def call(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        output = call_model(model, tensors, **keywords)
        note(STATES, output.get("hidden_states", ()) if isinstance(output, Mapping) else ())
        return {}

    handles = []
    for name, module in model.named_modules():
        hook = module.register_forward_pre_hook
        handles.append(hook(lambda _m, args, kwargs, n=name: note(f"{n}{INPUT}", (args, kwargs)), with_kwargs=True))
        handles.append(module.register_forward_hook(lambda _m, _a, output, n=name: note(n, output)))
    ids = torch.ones(1, _TOKENS, dtype=torch.long)
    try:
        run_true_fp64(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, call=call)
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(found)


def _is_sequence_first(value: Any) -> bool:
    leaves = tree_leaves(value if not hasattr(value, "to_tuple") else value.to_tuple())
    states = (leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 2)
    return next((tuple(state.shape[:2]) == (_TOKENS, 1) for state in states), False)


def batch_first(states: Tensor, name: str, turned: frozenset[str]) -> Tensor:
    """The states as `[batch, sequence, …]`.

    Args:
        states: of that place, with both dimensions.
        name: a key of :func:`sequence_first`.
        turned: what :func:`sequence_first` returned.
    """
    return states.transpose(0, 1) if name in turned else states
