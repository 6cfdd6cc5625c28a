"""How `generate` calls a model, which differs between releases: the cache, its name, and the inputs of a step."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor

from numerics_suite.subjects.built_model import without_adapter

CACHES = ("cache", "past_key_values", "cache_params", "state", "mems")
"""Names of the cache in a call and in its output, that of the newest releases first."""


def cache_name(model: Any) -> str | None:
    """The keyword under which a model takes its cache; None for a model without one.

    Args:
        model: of transformers, or of remote code.
    """
    parameters = inspect.signature(type(without_adapter(model)).forward).parameters
    handed_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return next((name for name in CACHES if name in parameters), "past_key_values" if handed_on else None)


def empty_cache(model: Any, *, rows: int, width: int) -> Any:
    """The initial cache of `generate`, None if the model makes its own at the first step.

    Args:
        model: with or without a language model's `generate`.
        rows: sequences of the batch.
        width: most tokens that a row will have.
    """
    name, model = cache_name(model), without_adapter(model)
    prepare = getattr(model, "_prepare_cache_for_generation", None)
    if prepare is None or name is None or not _has_cache_of_transformers(model):
        return None
    from transformers.generation.utils import GenerationMode  # heavy

    settings = copy.deepcopy(model.generation_config)
    settings.use_cache = True
    made: dict[str, Any] = {}
    every = {
        "generation_config": settings,
        "model_kwargs": made,
        "assistant_model": None,
        "generation_mode": GenerationMode.GREEDY_SEARCH,
        "batch_size": rows,
        "max_cache_length": width,
        "device": model.device,
    }
    # Up to 4.57 a static cache is kept on the model and used again, in the dtype of whoever asked first.
    vars(model).pop("_cache", None)
    try:
        prepare(**{key: every[key] for key in inspect.signature(prepare).parameters if key in every})
    except AttributeError:
        # A config without what a cache of transformers is made of (ChatGLM's has no `num_hidden_layers`): code of that age
        # makes its own.
        return None
    vars(model).pop("_cache", None)
    return made.get(name)


def _has_cache_of_transformers(model: Any) -> bool:
    """Whether `generate` passes the model a cache, rather than the model returning its own."""
    supports = getattr(model, "_supports_default_dynamic_cache", None)
    return bool(supports is not None and supports())


def names_keyword(model: Any, keyword: str) -> bool:
    """Whether a model's call has a keyword by that name.

    Args:
        model: of transformers, of peft, or of remote code.
        keyword: such as `position_ids`.
    """
    return keyword in inspect.signature(type(without_adapter(model)).forward).parameters


def is_stateful(model: Any) -> bool:
    """Whether the class declares a recurrent state, so that no step decodes several tokens."""
    return bool(getattr(without_adapter(model), "_is_stateful", False))


def prepared_step(
    model: Any, ids: Tensor, mask: Tensor, *, start: int, positions: bool = True, **keywords: Any
) -> dict[str, Any] | None:
    """The inputs that `generate` passes for the columns from `start` on.

    Args:
        model: of transformers, or of remote code.
        ids: `[batch, width]`, the columns that were decoded before included.
        mask: `[batch, width]`.
        start: columns that the cache holds.
        positions: with the `position_ids` that `generate` computes. Multimodal models remember these for later steps.
        keywords: `use_cache`, and the cache under its name.

    Returns:
        Keywords of the call, with logits of every column; None where the class cannot prepare such a step (remote code
        that only ever decodes one token).
    """
    model = without_adapter(model)
    method = getattr(model, "prepare_inputs_for_generation", None)
    if method is None:
        return None
    width = int(ids.shape[1])
    named = _named_by_any(type(model), "prepare_inputs_for_generation")
    more: dict[str, Any] = {
        "cache_position": torch.arange(start, width, device=ids.device),
        "next_sequence_length": width - start if start else None,
        "is_first_iteration": start == 0,
        "is_first_forward": start == 0,
    }
    words = {key: value for key, value in more.items() if key in named}
    count = getattr(model, "_prepare_position_ids_for_generation", None) if positions else None
    if count is not None and names_keyword(model, "position_ids"):
        words["position_ids"] = count(ids, {"attention_mask": mask})
    step = dict(method(ids, attention_mask=mask, **words, **keywords))
    for key in ("logits_to_keep", "num_logits_to_keep", "return_last_logit"):
        step.pop(key, None)
    given = step.get("input_ids")
    return step if isinstance(given, Tensor) and given.shape[1] == width - start else None


def _named_by_any(cls: type, method: str) -> set[str]:
    """Parameters that a method names in any class of the MRO, since each passes on the rest."""
    found = (vars(base)[method] for base in cls.__mro__ if method in vars(base))
    return {name for function in found for name in inspect.signature(function).parameters}
