"""Switches a mixture of experts' router loss off or on for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from numerics_suite.core.errors import NotApplicableError

SWITCH = "output_router_logits"
"""The key of a config with which a model adds the router's loss to its own; the name is the same in every release and
family of transformers."""


def adds_router_loss(model: nn.Module) -> bool:
    """Whether the model adds a loss that balances its experts to the loss that it returns."""
    return any(True for _ in _configs(model, on=True))


@contextmanager
def without_router_loss(model: nn.Module) -> Iterator[None]:
    """Let the model return its cross entropy alone, and no router logits; nothing changes for one without a router's loss.

    The router's loss compares how often an expert was chosen with how likely that was, over all tokens of a batch. It is
    no mean over labels, so micro-batches do not add up to it, and it takes a mask as long as the ids, which decoding
    has not.

    Args:
        model: put back as it was.
    """
    with _switched(list(_configs(model, on=True)), on=False):
        yield


@contextmanager
def with_router_loss(model: nn.Module) -> Iterator[None]:
    """Let the model add its router's loss, which most configs leave off and training switches on.

    Args:
        model: put back as it was.

    Raises:
        NotApplicableError: it has no such loss.
    """
    off = list(_configs(model, on=False))
    if not off and not adds_router_loss(model):
        reason = "the model has no router's loss"
        raise NotApplicableError(reason)
    with _switched(off, on=True):
        yield


@contextmanager
def _switched(configs: list[Any], *, on: bool) -> Iterator[None]:
    for config in configs:
        setattr(config, SWITCH, on)
    try:
        yield
    finally:
        for config in configs:
            setattr(config, SWITCH, not on)


def _configs(model: nn.Module, *, on: bool) -> Iterator[Any]:
    """The configs whose switch is on, or off: of the model, of its parts, and those within a config."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        for owned in (config, *vars(config).values()) if hasattr(config, "__dict__") else ():
            if getattr(owned, SWITCH, None) is on:
                seen[id(owned)] = owned
    yield from seen.values()
