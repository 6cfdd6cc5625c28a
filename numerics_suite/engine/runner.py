"""Runs one model, or a part of it, under one condition: forward pass, backward pass and the two references."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from numerics_suite.devices.arithmetic import autocast_off
from numerics_suite.devices.condition import Condition
from numerics_suite.engine.calls import call_model, call_with
from numerics_suite.engine.outputs import floating_outputs
from numerics_suite.engine.room import require_gradients
from numerics_suite.engine.rounded_reference import RoundedRun, run_rounded
from numerics_suite.engine.true_fp64 import Fp64Run, LiftToFp64, run_true_fp64

Caller = Callable[[nn.Module, Mapping[str, Any]], Any]
"""Calls a model on a batch, once or in pieces, and returns its outputs."""

Result = TypeVar("Result")


@contextlib.contextmanager
def forward_pass(condition: Condition) -> Iterator[None]:
    """Around a forward pass under the condition.

    In fp64 the sections that a program hard-codes in float32 are lifted: float64 parameters alone are no float64 run, as
    the mask's float64 minimum overflows in eager attention's float32 softmax and a row of padding is NaN.
    """
    with condition.forward(), _lifted(condition):
        yield


@contextlib.contextmanager
def backward_pass(condition: Condition) -> Iterator[None]:
    """Around a backward pass under the condition: without autocast, with the switches of arithmetic."""
    with condition.arithmetic(), _lifted(condition):
        yield


def _lifted(condition: Condition) -> contextlib.AbstractContextManager[object]:
    return LiftToFp64({}) if condition.precision.computes_in == "float64" else contextlib.nullcontext()


def dropped_gradients(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], scale: float) -> None:
    """Run a forward and a backward pass and drop the gradients; those that a loop has accumulated stay.

    Args:
        model: whose output has a `loss`; without one only the forward pass runs.
        args: positional arguments of the call.
        kwargs: those by name.
        scale: of the loss.
    """
    with torch.enable_grad():
        loss = floating_outputs(call_with(model, args, kwargs)).get("loss")
        if loss is not None:
            with autocast_off(loss.device):
                trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
                torch.autograd.grad(loss * scale, trained, allow_unused=True)


@dataclass(frozen=True, slots=True)
class Runner:
    """One model under one condition; inputs are moved to the model's device."""

    model: nn.Module
    condition: Condition

    def forward(self, tensors: Mapping[str, Any], **keywords: Any) -> Any:
        """The raw output of one forward pass without gradients.

        Args:
            tensors: what the model is called with.
            keywords: more keywords of the call.
        """
        return self.apply(lambda: call_model(self.model, tensors, **keywords))

    def apply(self, function: Callable[[], Result]) -> Result:
        """Call a function without gradients under the condition."""
        with torch.no_grad(), forward_pass(self.condition):
            return function()

    def submodule(self, module: nn.Module, *args: Any) -> Any:
        """The output of a part of the model for these arguments, without gradients."""
        return self.apply(lambda: call_with(module, args, {}))

    def gradients(self, tensors: Mapping[str, Any], call: Caller = call_model) -> dict[str, Tensor]:
        """The gradients of one backward pass in the parameters' own dtypes, by name; the loss is the call's output `loss`."""
        require_gradients(self.model.parameters(), 0)
        with torch.enable_grad(), forward_pass(self.condition):
            loss = floating_outputs(call(self.model, tensors))["loss"]
        named = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        with backward_pass(self.condition):
            found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        return {name: g.detach() for name, g in zip(named, found, strict=True) if g is not None}

    def true_fp64(
        self, tensors: Mapping[str, Any], *, gradients: bool = False, call: Caller = call_model, **options: Any
    ) -> Fp64Run:
        """The run wholly in float64; see :func:`numerics_suite.engine.true_fp64.run_true_fp64`."""
        return run_true_fp64(self.model, tensors, gradients=gradients, call=call, **options)

    def rounded(self, tensors: Mapping[str, Any], *, gradients: bool = False, call: Caller = call_model) -> RoundedRun:
        """The run with every op rounded once; see :func:`numerics_suite.engine.rounded_reference.run_rounded`."""
        return run_rounded(self.model, tensors, gradients=gradients, autocast=self.condition.autocast, call=call)
