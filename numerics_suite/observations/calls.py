"""Watching every call of every module: what went in, taken before the call, and what came out."""

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
    """Hooks on all modules for the while.

    Args:
        model: whose modules are watched, itself included.
        before: takes what is wanted of `(args, kwargs)`; an op in place may change them later.
        after: gets the module's dotted name, what `before` took, and the output; in the order in which modules return.
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
