"""In which module the gradient of parameters ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from numerics_suite.diagnosis.consequences import NO_RUN
from numerics_suite.engine.outputs import floating_outputs
from numerics_suite.engine.training_loop import HaltedError
from numerics_suite.training_watch.caught_step import CaughtStep


def end_of_gradient(caught: CaughtStep, names: Sequence[str]) -> str | None:
    """The smallest module around one of the parameters whose output is cut off, or that gets a gradient which it does not pass on.

    Going outwards from a parameter, the modules' outputs get no gradient up to the one in which it ends. Of several the innermost counts.
    """
    trainer = caught.trainer(caught.once)
    outputs: dict[str, bool | None] = {}
    """By module: True where a gradient came to its output, False where none or zeros did, None where it is cut off."""
    with contextlib.ExitStack() as stack:
        for name, module in trainer.model.named_modules():
            stack.callback(module.register_forward_hook(_listener(name, outputs)).remove)
        with contextlib.suppress(HaltedError, *NO_RUN):
            trainer.step(caught.first_step)
    ends = [end for name in names if (end := _first_alive(name, outputs)) is not None]
    return max(ends, key=lambda end: end.count("."), default=None) or None


def _listener(name: str, outputs: dict[str, bool | None]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        tensors = list(floating_outputs(output).values())
        if not tensors:
            return
        live = [tensor for tensor in tensors if tensor.requires_grad]
        outputs[name] = outputs.get(name) or (False if live else None)

        def arrived(gradient: Tensor) -> None:
            outputs[name] = outputs[name] or bool(gradient.any())

        for tensor in live:
            tensor.register_hook(arrived)  # type: ignore[no-untyped-call]

    return hook


def _first_alive(name: str, outputs: dict[str, bool | None]) -> str | None:
    """The first module outwards of the parameter whose output is cut off or gets a gradient; None where there is none."""
    module = name.rpartition(".")[0]
    while module:
        if module in outputs and outputs[module] is not False:
            return module
        module = module.rpartition(".")[0]
    return None
