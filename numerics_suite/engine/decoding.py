"""Decoding with the model's own cache, step by step as `generate` does, and the same call without a cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.engine.calls import call_model, input_device, to_device
from numerics_suite.engine.reference_ops import preserved
from numerics_suite.subjects import generation

Call = Callable[[nn.Module, Mapping[str, Any]], dict[str, Tensor]]
"""Calls a model and gives its logits `[batch, width, vocabulary]` as `answer`."""

Positions = Literal["generate", "none", "counted"]
"""Source of a step's positions: those that `generate` computes from the mask, the model's own, or those of real tokens
counted here."""


NO_CACHE = "the model keeps no cache"


def with_cache(cuts: Sequence[int], *, positions: Positions = "generate", run: Callable[..., Any] = call_model) -> Call:
    """Calls the model on the sequence cut at these columns, passing its cache from piece to piece.

    Args:
        cuts: columns at which a new step begins, rising.
        positions: their source.
        run: calls the model with the keywords of a step.

    Returns:
        A call that raises NotApplicableError if the model returns no cache.
    """

    def call(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        with preserved(model):  # what `generate` notes on the model moves the positions of a later call
            return decoded(model, tensors)

    def decoded(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        given = to_device(dict(tensors), input_device(model))
        ids, mask = given["input_ids"], given["attention_mask"]
        name = generation.cache_name(model)
        if name is None:
            raise NotApplicableError(NO_CACHE)
        cached = generation.empty_cache(model, rows=int(ids.shape[0]), width=int(ids.shape[1]))
        logits = []
        for start, stop in itertools.pairwise([0, *cuts, int(ids.shape[1])]):
            step = _step(model, ids[:, :stop], mask[:, :stop], start, positions, **{name: cached})
            output = run(model, {}, **step)
            cached = cache_in(output, name)
            if cached is None:
                raise NotApplicableError(NO_CACHE)
            logits.append(_one_row_a_token(output["logits"], rows=int(ids.shape[0]), tokens=stop - start))
        return {"answer": torch.cat(logits, dim=1)}

    return call


def keeps_tuples(model: nn.Module, tensors: Mapping[str, Any]) -> bool:
    """Whether the model returns keys and values as plain tuples, as code from before transformers' `Cache` does."""
    given = to_device(dict(tensors), input_device(model))
    name = generation.cache_name(model)
    if name is None:
        return False
    step = _step(model, given["input_ids"], given["attention_mask"], 0, "generate")
    return isinstance(cache_in(call_model(model, {}, **step), name), tuple)


def without_cache(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """The whole sequence in one call as `generate` makes it with `use_cache=False`, with its positions."""
    given = to_device(dict(tensors), input_device(model))
    ids, mask = given["input_ids"], given["attention_mask"]
    with preserved(model):
        step = generation.prepared_step(model, ids, mask, start=0, use_cache=False)
    if step is None:
        positions = {"position_ids": counted_positions(mask)} if takes_positions(model) else {}
        step = {"input_ids": ids, "attention_mask": mask, **positions}
    return {"answer": call_model(model, {}, **step)["logits"]}


def takes_positions(model: nn.Module) -> bool:
    """Whether the model takes `position_ids`."""
    return generation.names_keyword(model, "position_ids")


def _step(
    model: nn.Module, ids: Tensor, mask: Tensor, start: int, positions: Positions, **cache: Any
) -> dict[str, Any]:
    own = positions == "generate"
    step = generation.prepared_step(model, ids, mask, start=start, positions=own, use_cache=True, **cache)
    if step is None:
        # Code that only ever prepares one token is called as a loop of the user's own would call it.
        step = {"input_ids": ids[:, start:], "attention_mask": mask, "use_cache": True, **cache}
        positions = "counted" if own and takes_positions(model) else positions
    else:
        if not own:
            step.pop("position_ids", None)
        if generation.names_keyword(model, "use_cache"):
            # ChatGLM2's code does not hand the word on, and what it is called without is for the config to say.
            step.setdefault("use_cache", True)
    if positions == "counted":
        step["position_ids"] = counted_positions(mask)[:, start:]
    return {key: value for key, value in step.items() if value is not None}


def _one_row_a_token(logits: Tensor, *, rows: int, tokens: int) -> Tensor:
    """The logits of a step; NaN, which is never the right answer, where there are not as many as tokens."""
    if tuple(logits.shape[:2]) == (rows, tokens):
        return logits
    return logits.new_full((rows, tokens, int(logits.shape[-1])), float("nan"))


def counted_positions(mask: Tensor) -> Tensor:
    """Positions that count only real tokens, `[batch, sequence]`; 0 for padding."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def cache_in(output: Any, name: str) -> Any:
    """The cache in an output, None where there is none.

    Args:
        output: of a model.
        name: of its cache in a call. Code for several releases takes both names, and its output has one of them.
    """
    names = (name, *generation.CACHES)
    found = (output.get(key) if hasattr(output, "get") else getattr(output, key, None) for key in names)
    return next((cache for cache in found if cache is not None), None)
