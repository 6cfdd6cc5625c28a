"""Which module gives another output for the same input? Digests of what goes in and out, run by run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Digests = list[tuple[str, bytes, bytes]]


def unsteady_module(model: nn.Module, run: Callable[[], object], *, runs: int = 16) -> str | None:
    """The innermost module that was given the same bits in two runs and gave others; None where none was seen.

    Args:
        model: whose modules name the place.
        run: a forward pass; the same one each time.
        runs: how often it is tried, since an order of summation may agree by luck.
    """
    first = _digests(model, run)
    for _ in range(runs - 1):
        again = _digests(model, run)
        for (name, given, gave), (other, given_again, gave_again) in zip(first, again, strict=False):
            if name == other and given == given_again and gave != gave_again:
                return name
    return None


def _digests(model: nn.Module, run: Callable[[], object]) -> Digests:
    """Name, digest of the inputs and digest of the outputs, in the order in which modules return."""
    found: Digests = []
    with _watched(model, found):
        run()
    return found


@contextmanager
def _watched(model: nn.Module, found: Digests) -> Iterator[None]:
    given: list[bytes] = []
    handles = []

    def enter(_module: nn.Module, args: Any, kwargs: Any) -> None:
        # Taken before the call: an op in place may change them.
        given.append(_digest((args, kwargs)))

    def leave(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append((name, given.pop(), _digest(output)))

        return note

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _digest(value: Any) -> bytes:
    digest = hashlib.sha256()
    for leaf in tree_leaves(value if not hasattr(value, "to_tuple") else value.to_tuple()):
        if isinstance(leaf, Tensor) and leaf.numel():
            digest.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.digest()
