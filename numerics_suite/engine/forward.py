"""One forward pass of a model under a precision recipe, with its floating outputs by name."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.devices.precisions import Precision
from numerics_suite.engine.true_fp64 import LiftToFp64


def dtype_of(name: str) -> torch.dtype:
    """`torch.dtype` of a name such as `bfloat16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@contextlib.contextmanager
def arithmetic(recipe: Precision, device: str) -> Iterator[None]:
    """The switches of the recipe around a forward pass: autocast on or off, TF32 on or off; restored after.

    In fp64 the sections that a program hard-codes in float32 are lifted: float64 parameters alone are no float64 run, as
    the mask's float64 minimum overflows in eager attention's float32 softmax and a row of padding is NaN.
    """
    kind = device.partition(":")[0]
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
    try:
        with contextlib.ExitStack() as stack:
            if recipe.autocast is not None:
                stack.enter_context(torch.autocast(kind, dtype=dtype_of(recipe.autocast)))
            else:
                stack.enter_context(backward_arithmetic(recipe))
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def backward_arithmetic(recipe: Precision) -> contextlib.AbstractContextManager[object]:
    """The switch of the recipe around a backward pass, which autocast has no part in: fp64 lifts here too."""
    return LiftToFp64({}) if recipe.parameters == "float64" else contextlib.nullcontext()


def takes_token_ids(model: nn.Module) -> bool:
    """Whether the model is called with `input_ids`, as every language model of transformers is."""
    return hasattr(model, "get_input_embeddings") and hasattr(model, "config")


@functools.cache
def _takes(function: Callable[..., Any], keyword: str) -> bool:
    """Whether the function has that keyword by name, or hands on those that it does not know."""
    parameters = inspect.signature(function).parameters
    return keyword in parameters or any(value.kind is value.VAR_KEYWORD for value in parameters.values())


def call_model(model: nn.Module, tensors: Mapping[str, Any], **keywords: Any) -> Any:
    """Call the model as a training loop would.

    Args:
        model: any module.
        tensors: keyword arguments; for a plain module that takes no such keywords, its single tensor positionally.
        keywords: more of them, such as `use_cache` or `output_hidden_states`.
    """
    # Encoders and heads for tokens have no cache, and may refuse the word.
    if takes_token_ids(model) and _takes(type(model).forward, "use_cache"):
        keywords.setdefault("use_cache", False)
    return model(**tensors, **keywords)


def floating_outputs(output: object) -> dict[str, Tensor]:
    """The floating tensors of a model's output by name: `logits`, `loss`, …; a bare tensor is `output`.

    One in a tuple is `output0`, one deeper down `output1.0` or `hidden_states.3`; a cache of keys and values is left out.
    """
    if isinstance(output, Tensor):
        return _floating("output", output)
    if isinstance(output, Mapping):
        named: list[tuple[str, object]] = [(str(name), value) for name, value in output.items()]
    elif isinstance(output, (tuple, list)):
        named = [(f"output{index}", value) for index, value in enumerate(output)]
    else:
        named = [(name, value) for name, value in getattr(output, "__dict__", {}).items() if not name.startswith("_")]
    found: dict[str, Tensor] = {}
    for name, value in named:
        if name != "past_key_values":
            found |= _floating(name, value)
    return found


def _floating(name: str, value: object) -> dict[str, Tensor]:
    """The floating tensors in a value of that name."""
    if isinstance(value, Tensor):
        return {name: value} if value.is_floating_point() or value.is_complex() else {}
    found: dict[str, Tensor] = {}
    if isinstance(value, Mapping):
        for key, item in value.items():
            found |= _floating(f"{name}.{key}", item)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            found |= _floating(f"{name}.{index}", item)
    return found


def main_output(outputs: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """The output that a user reads: the logits, else the first floating tensor that is no loss.

    Raises:
        NotApplicableError: there is none.
    """
    for name in ("logits", "last_hidden_state", *outputs):
        if name in outputs and name != "loss":
            return name, outputs[name]
    if "loss" in outputs:
        return "loss", outputs["loss"]
    reason = "the model puts out no floating tensor"
    raise NotApplicableError(reason)


def loss_in(outputs: Mapping[str, Tensor]) -> Tensor:
    """What a model is trained on: its loss; of a plain module the mean square of its main output, which gives every parameter a gradient.

    Args:
        outputs: of :func:`floating_outputs`.
    """
    return outputs["loss"] if "loss" in outputs else main_output(outputs)[1].float().square().mean()


def autocast_dtype(recipe: Precision) -> torch.dtype | None:
    """The dtype of the recipe's autocast regions, None without them."""
    return None if recipe.autocast is None else dtype_of(recipe.autocast)


def to_device(tensors: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The same mapping with its tensors on the device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in tensors.items()}
