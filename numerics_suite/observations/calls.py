"""Watches every call of every module: inputs, taken before the call, and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

Taken = TypeVar("Taken")


@contextmanager
def watched_calls(
    model: nn.Module, before: Callable[[Any], Taken], after: Callable[[str, Taken, Any], None]
) -> Iterator[None]:
    """Set hooks on all modules until exit.

    Args:
        model: whose modules are watched, itself included.
        before: copies what it needs from `(args, kwargs)`; an in-place op may change them later.
        after: gets the module's dotted name, the result of `before`, and the output; in the order in which modules
            return.
    """
    taken: list[Taken] = []
    handles = []

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        taken.append(before((args, kwargs)))

    def leave(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            after(name, taken.pop(), output)

        return note

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
