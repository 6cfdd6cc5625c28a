"""A copy of a model that keeps its first blocks only, for questions whose answer does not depend on depth."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from numerics_suite.engine.blocks import decoder_blocks
from numerics_suite.subjects.layers import BLOCK_LISTS, COUNTS, shallower_config


def blocks_beyond(model: nn.Module, kept: int) -> tuple[str, ...]:
    """Names of the blocks after the first `kept`; empty where the model has no list of blocks, or no more than that."""
    names = decoder_blocks(model)
    if not names or names[0].split(".")[-2] not in BLOCK_LISTS:
        return ()
    return tuple(names[kept:])


def shallow_copy(model: nn.Module, kept: int) -> nn.Module:
    """A copy with the first `kept` blocks, and with counts of blocks in configs and modules that agree.

    Args:
        model: of transformers, or peft's around one; left as it was. The other blocks are not copied.
        kept: at least 1.

    Returns:
        A whole copy where `blocks_beyond` finds nothing to leave out. Whether the class runs with fewer blocks is for the
        caller to find out.
    """
    beyond = blocks_beyond(model, kept)
    if not beyond:
        return copy.deepcopy(model)
    listed: Any = model.get_submodule(beyond[0].rpartition(".")[0])
    every = list(listed)
    del listed[kept:]
    try:
        copied = copy.deepcopy(model)
    finally:
        listed.extend(every[kept:])
    _count_anew(copied, len(every), kept)
    return copied


def _count_anew(model: nn.Module, whole: int, kept: int) -> None:
    """Write the new number of blocks into configs and into modules that copied the old one."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        held = vars(module)
        configs.update({id(value): value for value in held.values() if hasattr(value, "to_dict")})
        held.update({name: kept for name in COUNTS if held.get(name) == whole})
    for config in configs.values():
        held = vars(config)
        for name in COUNTS:
            if held.get(name) == whole:
                held.update(shallower_config(dict(held), name, tuple(range(kept))))
