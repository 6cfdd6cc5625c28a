"""Runs one module alone, in true fp64 and rounded once, on copies of its real inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from numerics_suite.devices.device import has_float64
from numerics_suite.devices.kinds import CPU
from numerics_suite.engine import flash_registry
from numerics_suite.engine.calls import where_float64_is
from numerics_suite.engine.reference_ops import widen
from numerics_suite.engine.rounded_reference import RoundOnce
from numerics_suite.engine.true_fp64 import LiftToFp64, float64_surroundings


def run_module_in_fp64(
    module: nn.Module, args: Any, kwargs: Any, names: Mapping[int, str]
) -> tuple[Any, tuple[str, ...]]:
    """The module's output in true fp64, and what could not be lifted.

    Args:
        module: left as it was.
        args: its positional arguments in the real run; they are copied.
        kwargs: those by name.
        names: module id to name.
    """
    twin = where_float64_is(module)
    device = _moved_to((args, kwargs))
    mode = LiftToFp64(names, frozenset(p.untyped_storage().data_ptr() for p in twin.parameters()))
    with _disable_current_modes(), float64_surroundings(twin):
        own_args, own_kwargs = _own(args, device), _own(kwargs, device)
        with mode:
            output = twin(*own_args, **own_kwargs)
    return output, tuple(mode.left_out)


def run_module_rounded(module: nn.Module, args: Any, kwargs: Any, names: Mapping[int, str]) -> Any:
    """The module's output with every op rounded once; the arguments are those of :func:`run_module_in_fp64`."""
    twin = where_float64_is(module)
    device = _moved_to((args, kwargs))
    with _disable_current_modes():
        own_args, own_kwargs = _own(args, device, wide=False), _own(kwargs, device, wide=False)
        with flash_registry.visible_attention(twin), RoundOnce(names):
            return twin(*own_args, **own_kwargs)


def _moved_to(value: Any) -> torch.device | None:
    """The CPU if an input is on a device without float64; None if inputs stay where they are."""
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return torch.device(CPU) if any(not has_float64(tensor.device) for tensor in tensors) else None


def _own(value: Any, device: torch.device | None, *, wide: bool = True) -> Any:
    """Copy a module's argument: tensors and containers are copied (and upcast), and so is a cache."""
    if isinstance(value, Tensor):
        moved = value if device is None else value.to(device)
        upcast = widen(moved) if wide else moved
        return value.clone() if upcast is value else upcast
    if isinstance(value, torch.dtype):
        return widen(value) if wide else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_own(item, device, wide=wide) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(_own(item, device, wide=wide) for item in value)
    if type(value) is dict:
        return {name: _own(item, device, wide=wide) for name, item in value.items()}
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value
