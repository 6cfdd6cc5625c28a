"""The last batches and the random states before them, held so that a bad step can be run again."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from numerics_suite.devices import random_state
from numerics_suite.devices.arithmetic import autocast_as, autocast_dtypes
from numerics_suite.devices.kinds import CPU, kind_of
from numerics_suite.engine.outputs import floating_outputs

Rates = tuple[Mapping[str, Any], ...]
"""Learning rate, betas, momentum and weight decay of each group of an optimizer."""

CLONED_BYTES = 1 << 20
"""Inputs up to this size are copied, so that a loop that refills its buffers does not change them; larger ones are referred to."""


EARLY = 12
"""Steps from the first one on that are all kept while their inputs are small: what fails this soon can be taken again from the beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardCall:
    """One forward pass of the watched model.

    Attributes:
        step: optimizer step, from 1.
        args: positional inputs.
        kwargs: inputs by name.
        rng: random states before it, by device: `cpu`, `cuda:0`, …
        autocast: dtype of the autocast section around it, by kind of device; empty outside one.
        cotangents: what a loop that computes its loss outside of the model sends back into each output, once it has; empty where the model has a loss,
            or where they are large.
    """

    step: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rng: Mapping[str, Tensor]
    autocast: Mapping[str, torch.dtype]
    cotangents: dict[str, Tensor] = field(default_factory=dict)


class Ring:
    """The calls of the last steps."""

    def __init__(self, steps: int) -> None:
        """Keep those of that many steps, and at least of the running one."""
        self.steps = max(1, steps)
        self.calls: deque[ForwardCall] = deque()
        self.rates: dict[int, dict[int, Rates]] = {}
        self._early = True

    def add(self, step: int, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device) -> None:
        """Keep a call that is about to be made.

        Args:
            step: optimizer step.
            args: positional inputs.
            kwargs: inputs by name.
            device: of the model, whose random state is kept beside the CPU's.
        """
        self._early = self._early and step <= EARLY and _is_small((args, kwargs))
        while not self._early and self.calls and self.calls[0].step <= step - self.steps:
            self.rates.pop(self.calls.popleft().step, None)
        kept_args, kept_kwargs = tree_map_only(Tensor, _kept, (args, dict(kwargs)))
        call = ForwardCall(
            step=step,
            args=kept_args,
            kwargs=kept_kwargs,
            rng=random_state.states_of([device]),
            autocast=autocast_dtypes(device),
        )
        self.calls.append(call)

    def listen(self, output: Any) -> None:
        """Keep what comes back into the output of the last call, where the model has no loss of its own; nothing waits for a device."""
        tensors = floating_outputs(output)
        if not self.calls or "loss" in tensors:
            return
        kept = self.calls[-1].cotangents
        for name, tensor in tensors.items():
            if tensor.requires_grad and tensor.nbytes <= CLONED_BYTES:
                tensor.register_hook(functools.partial(_add, kept, name))  # type: ignore[no-untyped-call]

    def note(self, step: int, optimizer: int, rates: Rates) -> None:
        """Keep what an optimizer is about to step by."""
        self.rates.setdefault(step, {})[optimizer] = rates

    def of_step(self, step: int) -> list[ForwardCall]:
        """The calls of one step, first to last."""
        return [call for call in self.calls if call.step == step]


def _add(kept: dict[str, Tensor], name: str, gradient: Tensor) -> None:
    """A second backward pass over one call adds to the first."""
    gradient = gradient.detach()
    kept[name] = kept[name] + gradient if name in kept else gradient.clone()


def _is_small(inputs: Any) -> bool:
    """Whether they are copied anyway, and take next to nothing."""
    return sum(leaf.nbytes for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)) <= CLONED_BYTES


def _kept(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if tensor.numel() * tensor.element_size() <= CLONED_BYTES else tensor


@contextlib.contextmanager
def as_called(call: ForwardCall, device: torch.device) -> Iterator[None]:
    """The random states and the autocast sections of the call; restored after.

    Args:
        call: that was kept.
        device: of the model that runs now, to which the sections move. Random states belong to a kind of device, whose
            generator alone draws the same numbers from them.
    """
    with contextlib.ExitStack() as stack:
        moved = {name: str(device) for name in call.rng if kind_of(name) == device.type and kind_of(name) != CPU}
        stack.enter_context(random_state.at(call.rng, moved))
        stack.enter_context(autocast_as(_moved_sections(call.autocast, device.type)))
        yield


def _moved_sections(sections: Mapping[str, torch.dtype], kind: str) -> dict[str, torch.dtype]:
    """The sections for a model on that kind of device: the accelerator's that was there before the CPU's."""
    accelerators = [dtype for name, dtype in sections.items() if name != CPU]
    dtype = next(
        iter([*(sections[name] for name in [kind] if name in sections), *accelerators, *sections.values()]), None
    )
    return {} if dtype is None else {kind: dtype}


@contextlib.contextmanager
def with_values(named: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within it the parameters hold other values."""
    before = {name: parameter.data for name, parameter in named.items() if name in values}
    try:
        for name, data in before.items():
            named[name].data = values[name].to(data.device, data.dtype)
        yield
    finally:
        for name, data in before.items():
            named[name].data = data


@contextlib.contextmanager
def same_buffers(buffers: Callable[[], Iterator[Tensor]]) -> Iterator[None]:
    """A second forward pass leaves running statistics and caches as they were."""
    kept = [(buffer, buffer.detach().clone()) for buffer in buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                if buffer.shape == value.shape:
                    buffer.copy_(value)
