"""One forward pass of a model under a precision recipe, with its floating outputs by name."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.running.precisions import Precision


def dtype_of(name: str) -> torch.dtype:
    """`torch.dtype` of a name such as `bfloat16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


@contextlib.contextmanager
def arithmetic(recipe: Precision, device: str) -> Iterator[None]:
    """The switches of the recipe around a forward pass: autocast on or off, TF32 on or off; restored after."""
    kind = device.partition(":")[0]
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = recipe.tf32
    try:
        if recipe.autocast is None:
            yield
        else:
            with torch.autocast(kind, dtype=dtype_of(recipe.autocast)):
                yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def takes_token_ids(model: nn.Module) -> bool:
    """Whether the model is called with `input_ids`, as every language model of transformers is."""
    return hasattr(model, "get_input_embeddings") and hasattr(model, "config")


def call_model(model: nn.Module, tensors: Mapping[str, Any], **keywords: Any) -> Any:
    """Call the model as a training loop would.

    Args:
        model: any module.
        tensors: keyword arguments; for a plain module that takes no such keywords, its single tensor positionally.
        keywords: more of them, such as `use_cache` or `output_hidden_states`.
    """
    if takes_token_ids(model):
        keywords.setdefault("use_cache", False)
        # A head for labels ignores nothing that it does not know: token classification has no cache.
        if "TokenClassification" in type(model).__name__:
            keywords.pop("use_cache")
    return model(**tensors, **keywords)


def floating_outputs(output: object) -> dict[str, Tensor]:
    """The floating tensors of a model's output by name: `logits`, `loss`, …; a bare tensor is `output`."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        named: list[tuple[str, object]] = list(output.items())
    elif isinstance(output, (tuple, list)):
        named = [(f"output{index}", value) for index, value in enumerate(output)]
    else:
        named = [(name, value) for name, value in vars(output).items() if not name.startswith("_")]
    return {
        str(name): value
        for name, value in named
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
    }


def main_output(outputs: Mapping[str, Tensor]) -> tuple[str, Tensor]:
    """The output that a user reads: the logits, else the first floating tensor that is no loss."""
    for name in ("logits", "last_hidden_state", *outputs):
        if name in outputs and name != "loss":
            return name, outputs[name]
    return next(iter(outputs.items()))


def to_device(tensors: Mapping[str, Any], device: str) -> dict[str, Any]:
    """The same mapping with its tensors on the device."""
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in tensors.items()}
