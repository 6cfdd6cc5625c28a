"""A module of a lower-precision model that computes in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from numerics_suite.devices.arithmetic import autocast_off
from numerics_suite.engine.calls import input_device


def hold_in_float32(module: nn.Module) -> None:
    """Hold the module in float32, autocast off within it; outputs are cast to the dtype of its inputs."""
    held = next((parameter.dtype for parameter in module.parameters()), None)
    module.float()
    # A class of its own, not a function set on the instance: that one would run the original's weights in a copy.
    kind = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        came_in = next((leaf.dtype for leaf in _floats((args, kwargs))), held)
        with autocast_off(input_device(self)):
            output = kind.forward(self, *_cast(args, torch.float32), **_cast(kwargs, torch.float32))
        return output if came_in is None else _cast(output, came_in)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _floats(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, value
    )
