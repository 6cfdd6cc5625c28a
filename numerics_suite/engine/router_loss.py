"""A mixture of experts asked for its cross entropy alone: the router's loss is switched off for the while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

SWITCH = "output_router_logits"
"""The key of a config with which a model adds the router's loss to its own; every release and family of transformers has this name."""


def adds_router_loss(model: nn.Module) -> bool:
    """Whether the model adds a loss that balances its experts to the loss that it returns."""
    return any(True for _ in _configs(model))


@contextmanager
def without_router_loss(model: nn.Module) -> Iterator[None]:
    """Let the model return its cross entropy alone, and no router logits; nothing changes for one without a router's loss.

    The router's loss compares how often an expert was chosen with how likely that was, over all tokens of a batch. It is
    no mean over labels, so micro-batches do not add up to it, and it takes a mask as long as the ids, which decoding
    has not.

    Args:
        model: put back as it was.
    """
    switched = list(_configs(model))
    for config in switched:
        setattr(config, SWITCH, False)
    try:
        yield
    finally:
        for config in switched:
            setattr(config, SWITCH, True)


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configs that have the switch on: of the model, of its parts, and those within a config."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        for owned in (config, *vars(config).values()) if hasattr(config, "__dict__") else ():
            if getattr(owned, SWITCH, False) is True:
                seen[id(owned)] = owned
    yield from seen.values()
