"""Calls of a model: every input is moved to the model's own device first."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from numerics_suite.devices.device import has_float64
from numerics_suite.devices.kinds import CPU


def input_device(model: nn.Module) -> torch.device:
    """The device for inputs: that of the input embedding, else of the first parameter or buffer.

    A model that is spread over several devices starts on the embedding's device.
    """
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    for owner in (embeddings() if embeddings is not None else None, model):
        if isinstance(owner, nn.Module):
            for held in itertools.chain(owner.parameters(), owner.buffers()):
                return held.device
    return torch.device(CPU)


def to_device(value: Any, device: str | torch.device) -> Any:
    """The same value with every tensor in it on the device."""
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), value)


def takes_token_ids(model: nn.Module) -> bool:
    """Whether the model is called with `input_ids`, as every language model of transformers is."""
    return hasattr(model, "get_input_embeddings") and hasattr(model, "config")


@functools.cache
def _takes(function: Callable[..., Any], keyword: str) -> bool:
    """Whether the function accepts that keyword, by name or through `**kwargs`."""
    parameters = inspect.signature(function).parameters
    return keyword in parameters or any(value.kind is value.VAR_KEYWORD for value in parameters.values())


def takes_decoder_ids(model: nn.Module) -> bool:
    """Whether the model is an encoder-decoder, whose decoder reads tokens of its own."""
    config = getattr(model, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and _takes(type(model).forward, "decoder_input_ids")


def _with_decoder_ids(model: nn.Module, tensors: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add decoder ids to a call of an encoder-decoder that has no labels to make them from: the encoder's own tokens.

    Its outputs then have a row for each token of the batch, like those of every other model.
    """
    own = ("labels", "decoder_input_ids", "decoder_inputs_embeds")
    if "input_ids" not in tensors or any(tensors.get(name) is not None for name in own) or not takes_decoder_ids(model):
        return tensors
    mask = {"decoder_attention_mask": tensors["attention_mask"]} if "attention_mask" in tensors else {}
    return {**tensors, "decoder_input_ids": tensors["input_ids"], **mask}


def call_model(model: nn.Module, tensors: Mapping[str, Any], **keywords: Any) -> Any:
    """Call the model as a training loop would.

    Args:
        model: any module.
        tensors: keyword arguments, on any device.
        keywords: more of them, such as `use_cache` or `output_hidden_states`.
    """
    tensors = _with_decoder_ids(model, tensors)
    # Encoders and heads for tokens have no cache, and may refuse the word.
    if takes_token_ids(model) and _takes(type(model).forward, "use_cache"):
        keywords.setdefault("use_cache", False)
    return model(**to_device(dict(tensors), input_device(model)), **keywords)


def call_with(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call the model with exactly the arguments of a training loop's own call, moved to its device."""
    device = input_device(model)
    return model(*to_device(args, device), **to_device(dict(kwargs), device))


def where_float64_is(model: nn.Module) -> nn.Module:
    """The model itself, or a copy of it on the CPU where its device has no float64, as MPS; references run there."""
    return model if has_float64(input_device(model)) else copy.deepcopy(model).to(CPU)
