"""The floating outputs of a model by name, and which of them is its answer or its loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from numerics_suite.core.errors import NotApplicableError


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
