"""Hooks on a model and on optimizers that hold the watch weakly and come off again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from numerics_suite.core.attributes import with_attribute

Before = Callable[[tuple[Any, ...], dict[str, Any]], None]
After = Callable[[Any], None]


def plain_model(model: nn.Module) -> nn.Module:
    """The module within DistributedDataParallel, DataParallel and torch.compile's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in {"DistributedDataParallel", "DataParallel"}:
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within accelerate's wrapper and its like.

    Raises:
        TypeError: it is none.
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        message = f"watch: the optimizer is a {type(optimizer).__name__}, not a torch.optim.Optimizer"
        raise TypeError(message)
    return inner


def _weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Calls a bound method for as long as its object is there."""
    held = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        if (living := held()) is not None:
            living(*arguments)

    return call


@contextmanager
def around_forward(model: nn.Module, before: Before, after: After) -> Iterator[None]:
    """Within it each call of the model is reported to both bound methods, which are held weakly.

    A model compiled in place is wrapped from outside: hooks would be traced into its graph.
    """
    begin, end = _weakly(before), _weakly(after)
    del before, after  # this frame lives as long as the hooks do, and would hold the watch
    compiled = getattr(model, "_compiled_call_impl", None)
    if compiled is None:
        first = model.register_forward_pre_hook(lambda _, args, kwargs: begin(args, kwargs), with_kwargs=True)
        with _removed(first, model.register_forward_hook(lambda *called: end(called[2]))):
            yield
        return

    def watched(*args: Any, **kwargs: Any) -> Any:
        begin(args, kwargs)
        output = compiled(*args, **kwargs)
        end(output)
        return output

    with with_attribute(model, "_compiled_call_impl", watched):
        yield


@contextmanager
def around_step(
    optimizer: torch.optim.Optimizer,
    before: Callable[[torch.optim.Optimizer], None],
    after: Callable[[torch.optim.Optimizer], None],
) -> Iterator[None]:
    """Within it each step of the optimizer is reported to both bound methods, which are held weakly."""
    begin, end = _weakly(before), _weakly(after)
    del before, after  # as above
    first = optimizer.register_step_pre_hook(lambda stepping, *_: begin(stepping))
    with _removed(first, optimizer.register_step_post_hook(lambda stepping, *_: end(stepping))):
        yield


@contextmanager
def _removed(*handles: RemovableHandle) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
