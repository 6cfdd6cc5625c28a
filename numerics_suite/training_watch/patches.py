"""Places of torch that the watch listens at while one is open; the last to leave restores them.

`clip_grad_norm_` computes the norm that the watch needs, `backward` is called on the loss of a loop that computes it outside
the model, `GradScaler.step` is where a step is skipped. Each listener is held weakly: one that is gone leaves nothing behind.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.utils import clip_grad

_NO_METHOD = object()
_UNHEARD: list[object] = []
"""Not empty while a replay runs, whose gradients are no watch's business."""


class _Tap:
    """One patched function and its listeners."""

    def __init__(self, owner: Any, name: str, wrap: Callable[[Any, _Tap], Any]) -> None:
        self.owner, self.name, self.wrap = owner, name, wrap
        self.methods: list[weakref.WeakMethod[Callable[..., Any]]] = []
        self.original: Any = _NO_METHOD
        self.patched: Any = None

    def listeners(self) -> list[Callable[..., Any]]:
        if _UNHEARD:
            return []
        return [method for reference in list(self.methods) if (method := reference()) is not None]

    def add(self, method: Callable[..., Any]) -> weakref.WeakMethod[Callable[..., Any]]:
        if not self.methods:
            self.original = getattr(self.owner, self.name)
            self.patched = self.wrap(self.original, self)
            setattr(self.owner, self.name, self.patched)
        reference = weakref.WeakMethod(method)
        self.methods.append(reference)
        return reference

    def remove(self, reference: weakref.WeakMethod[Callable[..., Any]]) -> None:
        self.methods = [kept for kept in self.methods if kept is not reference]
        # Someone else who patched on top keeps a patch that no longer tells anyone anything.
        if not self.methods and getattr(self.owner, self.name, None) is self.patched:
            setattr(self.owner, self.name, self.original)


def _after_norm(original: Any, tap: _Tap) -> Any:
    def _get_total_norm(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Any:
        tensors = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        norm = original(tensors, norm_type, *args, **kwargs)
        for listener in tap.listeners():
            listener(tensors, float(norm_type), norm)
        return norm

    return _get_total_norm


def _before_backward(original: Any, tap: _Tap) -> Any:
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        for listener in tap.listeners():
            listener(tensors)
        return original(tensors, *args, **kwargs)

    return backward


def _before_clip(original: Any, tap: _Tap) -> Any:
    def _clip_grads_with_norm_(parameters: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Any:
        for listener in tap.listeners():
            listener(parameters, max_norm)
        return original(parameters, max_norm, *args, **kwargs)

    return _clip_grads_with_norm_


def _around_scaler(original: Any, tap: _Tap) -> Any:
    def step(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        for listener in tap.listeners():
            listener(self, optimizer, before=True)
        result = original(self, optimizer, *args, **kwargs)
        for listener in tap.listeners():
            listener(self, optimizer, before=False)
        return result

    return step


TAPS = {
    # The inner name: `from torch.nn.utils import clip_grad_norm_` made before the watch opened goes through it too.
    "norm": _Tap(clip_grad, "_get_total_norm", _after_norm),
    "clip": _Tap(clip_grad, "_clip_grads_with_norm_", _before_clip),
    "backward": _Tap(torch.autograd, "backward", _before_backward),
    "scaler": _Tap(torch.amp.GradScaler, "step", _around_scaler),
}


def is_unheard() -> bool:
    """Whether a replay runs."""
    return bool(_UNHEARD)


@contextmanager
def unheard() -> Iterator[None]:
    """Within it no listener is called."""
    mark = object()
    _UNHEARD.append(mark)
    try:
        yield
    finally:
        _UNHEARD.remove(mark)


@contextmanager
def listening(place: str, method: Callable[..., Any]) -> Iterator[None]:
    """Within it each call is reported to the bound method.

    Args:
        place: `norm` (gradients, order, norm), `clip` (parameters, the largest norm), `backward` (its roots) or `scaler` (scaler, optimizer, before=…).
        method: a bound method, held weakly.
    """
    tap = TAPS[place]
    reference = tap.add(method)
    del method  # this frame lives as long as the patch does, and would hold its listener
    try:
        yield
    finally:
        tap.remove(reference)
