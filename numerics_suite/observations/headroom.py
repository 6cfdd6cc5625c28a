"""How many bits are left between each module's largest activation and the largest number of its dtype?"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from numerics_suite.devices.arithmetic import autocast as autocast_section
from numerics_suite.engine import reference_ops
from numerics_suite.engine.calls import call_model, input_device
from numerics_suite.engine.outputs import floating_outputs
from numerics_suite.observations.tokens import at_real

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class Headroom:
    """The headroom of one module's outputs.

    Attributes:
        module: Its name, "" for the model itself.
        largest: Largest absolute value of its floating outputs; NaN and inf are kept.
        bits: log2(largest number of `dtype` / `largest`); inf for all zeros, -inf for an infinity, NaN for a NaN.
        dtype: Of that output, such as "float16".
    """

    module: str
    largest: float
    bits: float
    dtype: str


def headroom(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    autocast: torch.dtype | None = None,
    call: Callable[[nn.Module, Mapping[str, Any]], object] = call_model,
    real: Tensor | None = None,
) -> list[Headroom]:
    """Measure the headroom of every module in one run of `model` in evaluation mode, without gradients.

    Args:
        model: Any module, in the precision under test.
        batch: Tensors for the call.
        autocast: Lower dtype of an autocast section around the call.
        call: Calls the model.
        real: `[batch, sequence]` bool: padding is left out of what has token dimensions. None leaves out nothing.

    Returns:
        One record per module with a floating output, the worst of its outputs and runs, in the order in which the
        modules first returned.
    """
    names = {id(module): name for name, module in model.named_modules()}
    worst: dict[str, Headroom] = {}

    def look(module: nn.Module, args: object, output: object) -> None:  # noqa: ARG001 - the signature of a hook
        for tensor in floating_outputs(output).values():
            found = _headroom(names[id(module)], at_real(real, tensor))
            before = worst.get(found.module)
            if before is None or math.isnan(found.bits) or found.bits < before.bits:
                worst[found.module] = found

    with ExitStack() as stack:
        stack.enter_context(reference_ops.preserved(model))
        for module in model.modules():
            module.training = False
            module.register_forward_hook(look)
        stack.enter_context(torch.no_grad())
        stack.enter_context(autocast_section(input_device(model), autocast))
        call(model, batch)
    return list(worst.values())


def _headroom(name: str, tensor: Tensor) -> Headroom:
    largest = tensor.detach().abs().max().item() if tensor.numel() else 0.0
    limit = torch.finfo(tensor.dtype).max
    if math.isnan(largest):
        bits = math.nan
    elif largest == 0.0:
        bits = math.inf
    else:
        bits = -math.inf if math.isinf(largest) else math.log2(limit) - math.log2(largest)
    return Headroom(module=name, largest=largest, bits=bits, dtype=str(tensor.dtype).removeprefix("torch."))
