"""A training step as it is run to save memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeAlias

from torch import nn

from numerics_suite.engine.dropout import WithoutDropout
from numerics_suite.engine.true_fp64 import STREAM_ABOVE_BYTES

Caller: TypeAlias = Callable[[nn.Module, Mapping[str, Any]], object]


@contextmanager
def checkpointed(model: nn.Module, *, wanted: bool = True) -> Iterator[Callable[[Caller], Caller]]:
    """A training step as it is run to save memory: training mode, activation checkpointing, every dropout off.

    All of it leaves the function as it is, or the release has a defect that gradients then show.

    Args:
        model: its switches are put back.
        wanted: False gives calls as they are, and so does a model that is streamed, whose blocks are checkpointed anyhow.
    """
    size = sum(8 * parameter.numel() for parameter in model.parameters())
    if not wanted or size > STREAM_ABOVE_BYTES:
        yield lambda call: call
        return

    def in_training(call: Caller) -> Caller:
        def training(inner: nn.Module, tensors: Mapping[str, Any]) -> object:
            for module in inner.modules():
                module.training = True
            with WithoutDropout():
                return call(inner, tensors)

        return training

    supported = getattr(model, "supports_gradient_checkpointing", False)
    if supported:
        # The recomputation runs within the backward pass, beyond the call that turns dropout off.
        options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), WithoutDropout())}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    try:
        yield in_training
    finally:
        if supported:
            model.gradient_checkpointing_disable()  # type: ignore[operator]
