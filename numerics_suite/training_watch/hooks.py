"""Hooks on a model and on optimizers that hold the watch weakly and come off again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

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


@contextmanager
def around_forward(model: nn.Module, before: Before, after: After) -> Iterator[None]:
    """Within it each call of the model is reported to both bound methods.

    A model compiled in place is wrapped from outside: hooks would be traced into its graph.
    """
    first, second = weakref.WeakMethod(before), weakref.WeakMethod(after)
    del before, after  # this frame lives as long as the hooks do, and would hold the watch
    compiled = getattr(model, "_compiled_call_impl", None)
    if compiled is not None:
        with _around_compiled(model, compiled, first, second):
            yield
        return

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (method := first()) is not None:
            method(args, kwargs)

    def end(_module: nn.Module, _args: object, output: object) -> None:
        if (method := second()) is not None:
            method(output)

    handles = [model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _around_compiled(
    model: nn.Module, compiled: Any, first: weakref.WeakMethod[Before], second: weakref.WeakMethod[After]
) -> Iterator[None]:
    def watched(*args: Any, **kwargs: Any) -> Any:
        if (method := first()) is not None:
            method(args, kwargs)
        output = compiled(*args, **kwargs)
        if (method_after := second()) is not None:
            method_after(output)
        return output

    model._compiled_call_impl = watched  # noqa: SLF001 - what nn.Module.compile sets
    try:
        yield
    finally:
        model._compiled_call_impl = compiled  # noqa: SLF001 - as above


@contextmanager
def around_step(
    optimizer: torch.optim.Optimizer,
    before: Callable[[torch.optim.Optimizer], None],
    after: Callable[[torch.optim.Optimizer], None],
) -> Iterator[None]:
    """Within it each step of the optimizer is reported to both bound methods, which are held weakly."""
    first, second = weakref.WeakMethod(before), weakref.WeakMethod(after)
    del before, after  # this frame lives as long as the hooks do, and would hold the watch

    def begin(stepping: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        if (method := first()) is not None:
            method(stepping)

    def end(stepping: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        if (method := second()) is not None:
            method(stepping)

    handles = [optimizer.register_step_pre_hook(begin), optimizer.register_step_post_hook(end)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
