"""Random states of the CPU and of every accelerator: seed, save, restore."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from numerics_suite.devices.device import device_count, visible_accelerators
from numerics_suite.devices.kinds import CPU, device_module, kind_of


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Restore torch's generators on every device on exit."""
    with contextlib.ExitStack() as stack:
        kinds = list(visible_accelerators())
        for kind, count in kinds:
            stack.enter_context(torch.random.fork_rng(list(range(count)), device_type=kind))
        if not kinds:
            stack.enter_context(torch.random.fork_rng([]))
        yield


@contextlib.contextmanager
def torch_seeded(seed: int) -> Iterator[None]:
    """Seed torch's generators on every device; their states are restored on exit."""
    with kept():
        if any(visible_accelerators()):
            torch.manual_seed(seed)
        else:
            # `torch.manual_seed` would also queue the seed for each kind of device that is not there, with the stack in words.
            torch.default_generator.manual_seed(seed)
        yield


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, `random` and, where it is in use, numpy; each generator's state is restored on exit."""
    with torch_seeded(seed), python_seeded(seed):
        yield


@contextlib.contextmanager
def python_seeded(seed: int) -> Iterator[None]:
    """Seed `random` and, where it is in use, numpy; their states are restored on exit.

    Args:
        seed: 0 to 2**32 - 1, numpy's range; larger ones are taken modulo.
    """
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed % 2**32)
        yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def states_of(devices: Iterator[torch.device] | list[torch.device]) -> dict[str, Tensor]:
    """The random states of these devices and of the CPU, by device; read without synchronising."""
    states = {CPU: torch.get_rng_state()}
    for device in devices:
        module = device_module(device.type)
        if hasattr(module, "get_rng_state"):
            states[str(device)] = module.get_rng_state(device)
    return states


@contextlib.contextmanager
def at(states: Mapping[str, Tensor], moved: Mapping[str, str] | None = None) -> Iterator[None]:
    """Set the generators to these states, and restore them on exit.

    Args:
        states: of :func:`states_of`.
        moved: maps a saved device to one of this process; a device that is absent and not mapped is skipped.
    """
    with kept():
        for name, state in states.items():
            target = (moved or {}).get(name, name)
            if target == CPU:
                if name == CPU:
                    torch.set_rng_state(state)
            elif device_count(kind_of(target)) and kind_of(name) == kind_of(target):
                # A generator of another kind of device draws other numbers from any state.
                device_module(kind_of(target)).set_rng_state(state, target)
        yield
