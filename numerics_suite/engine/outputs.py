"""The floating outputs of a model by name, and which of them is its answer or its loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass

from torch import Tensor

from numerics_suite.core.errors import NotApplicableError

CACHE = "past_key_values"
"""Names of caches, which are state and not outputs."""


def floating_outputs(output: object) -> dict[str, Tensor]:
    """The floating tensors of a model's output by name: `logits`, `loss`, …; a bare tensor is `output`.

    One in a tuple is `output0`, or its field's name; one deeper down is `output1.0` or `hidden_states.3`. A cache is left out.
    """
    if isinstance(output, Tensor):
        return _floating("output", output)
    named = _items(output)
    if named is None:
        named = [(name, value) for name, value in getattr(output, "__dict__", {}).items() if not name.startswith("_")]
    elif isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        named = [(f"output{name}", value) for name, value in named]
    return _of_items("", named)


def _of_items(prefix: str, items: Iterable[tuple[str, object]]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in items:
        if name != CACHE:
            found |= _floating(prefix + name, value)
    return found


def _floating(name: str, value: object) -> dict[str, Tensor]:
    """The floating tensors in a value of that name."""
    if isinstance(value, Tensor):
        return {name: value} if value.is_floating_point() or value.is_complex() else {}
    return _of_items(f"{name}.", _items(value) or ())


def _items(value: object) -> list[tuple[str, object]] | None:
    """What a mapping, a sequence or a dataclass holds, by name; None of anything else."""
    if isinstance(value, Mapping):
        return [(str(name), item) for name, item in value.items()]
    if isinstance(value, (tuple, list)):
        names = getattr(value, "_fields", None) or [str(place) for place in range(len(value))]
        return list(zip(names, value, strict=True))
    if is_dataclass(value):
        return [(field.name, getattr(value, field.name)) for field in fields(value)]
    return None


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


def scalar_loss(output: object) -> Tensor:
    """The scalar that gradients start from: `loss`, or a bare tensor of one element.

    Raises:
        ValueError: the output has no scalar loss.
    """
    if isinstance(output, Tensor) and output.numel() == 1:
        return output
    loss = floating_outputs(output).get("loss")
    if loss is None or loss.numel() != 1:
        message = "gradients need a scalar loss: give the batch labels, or a call that returns the loss"
        raise ValueError(message)
    return loss
