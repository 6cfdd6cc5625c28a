"""The calls that a model documents: forward, forward and backward, generate, and training with gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from numerics_suite.engine.calls import input_device, to_device
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.training_loop import TrainingPlan, trainer_of
from numerics_suite.subjects.quiet import quiet_transformers

TENSORS = frozenset({"input_ids", "attention_mask", "labels", "position_ids", "token_type_ids"})
KEYWORDS = frozenset({"use_cache", "output_hidden_states", "output_attentions", "return_dict"})

NEW_TOKENS = 2
"""Tokens that `generate` makes: only the second is decoded with the cache."""


def is_documented(context: CellContext, tensors: Mapping[str, Any], keywords: Mapping[str, Any]) -> bool:
    """Whether the call is one that every user makes: int64 ids, masks and labels, or the batch that a factory gave.

    Args:
        context: the cell.
        tensors: that the model was called with, by name.
        keywords: of the same call.
    """
    own = context.loaded.batch
    if own is not None:
        alike = tensors.keys() <= own.keys() and all(_alike(value, own[name]) for name, value in tensors.items())
        return alike and keywords.keys() <= KEYWORDS
    whole = (
        isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() <= 2 for value in tensors.values()
    )
    return tensors.keys() <= TENSORS and keywords.keys() <= KEYWORDS and all(whole)


def _alike(value: object, other: object) -> bool:
    if isinstance(value, Tensor) and isinstance(other, Tensor):
        return value.dtype == other.dtype and value.shape == other.shape
    return type(value) is type(other)


def documented_calls(
    context: CellContext, tensors: Mapping[str, Any], keywords: Mapping[str, Any]
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each call's name, and a function that makes it under the cell's condition without any of our hooks or modes.

    Args:
        context: the cell, not in float64, where the suite itself changes sections that a program keeps in float32.
        tensors: what the model is called with.
        keywords: of the call.
    """
    yield "forward", lambda: context.run(context.inputs_in(tensors), **keywords)
    if context.recipe.trains and ("labels" in tensors or not context.takes_ids):
        yield "forward and backward", lambda: _trained(context, tensors, checkpointing=False)
        if getattr(context.model, "supports_gradient_checkpointing", False):
            words = "forward and backward with gradient checkpointing"
            yield words, lambda: _trained(context, tensors, checkpointing=True)
    if context.takes_ids and context.subject.task == "causal-lm" and hasattr(context.model, "generate"):
        yield "generate", lambda: _generated(context, tensors)


def _trained(context: CellContext, tensors: Mapping[str, Any], *, checkpointing: bool) -> None:
    model: Any = context.copy_model()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    trainer_of(model, tensors, condition=context.condition, plan=TrainingPlan(steps=1)).step(1)


def _generated(context: CellContext, tensors: Mapping[str, Any]) -> object:
    model: Any = context.model
    given = {name: value for name, value in tensors.items() if name in {"input_ids", "attention_mask"}}
    given = to_device(given, input_device(model))
    with quiet_transformers():
        return context.runner.apply(lambda: model.generate(**given, max_new_tokens=NEW_TOKENS, do_sample=False))
