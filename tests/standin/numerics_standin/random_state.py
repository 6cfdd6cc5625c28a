"""The random states of the device, one for each index, apart from the CPU's."""

from __future__ import annotations

from contextlib import contextmanager

import torch

from numerics_standin.memory import NAME
from numerics_standin.streams import device_index
from numerics_standin.switches import DEVICE_COUNT, check_alive, switches

_DEFAULT_SEED = 67280421310721  # what torch's own generators start with

_CpuGenerator = torch.Generator


class Generator(_CpuGenerator):
    """`torch.Generator` for every device: PyTorch's Python backends cannot make one of their own in C++.

    A generator of the stand-in is a CPU generator that says it belongs to the device; the device's kernels, which run
    on the CPU, draw from it.
    """

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        """Make a generator for `device`."""
        kind = torch.device(device) if not isinstance(device, int) else torch.device(NAME, device)
        if kind.type != NAME:
            return _CpuGenerator(device=kind)
        generator = super().__new__(cls, device="cpu")
        generator.standin_device = torch.device(NAME, device_index(kind))
        generator.manual_seed(_DEFAULT_SEED)
        return generator

    @property
    def device(self) -> torch.device:
        """The device whose kernels may draw from it."""
        return getattr(self, "standin_device", torch.device("cpu"))


default_generators = tuple(Generator(torch.device(NAME, index)) for index in range(DEVICE_COUNT))


def manual_seed(seed: int, device: object = None) -> None:
    """Seed the current device."""
    default_generators[device_index(device)].manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    """Seed every index."""
    for generator in default_generators:
        generator.manual_seed(int(seed))


def seed() -> int:
    """Seed the current device with a number that the system draws, and return it."""
    return default_generators[device_index()].seed()


def seed_all() -> None:
    """Seed every index with one number that the system draws."""
    manual_seed_all(seed())


def initial_seed() -> int:
    """Return the seed of the current device."""
    return default_generators[device_index()].initial_seed()


def get_rng_state(device: object = NAME) -> torch.Tensor:
    """Return the random state of `device` as bytes on the CPU."""
    if switches.lost:
        check_alive()
    return default_generators[device_index(device)].get_state()


def set_rng_state(new_state: torch.Tensor, device: object = NAME) -> None:
    """Put a state of `get_rng_state` back."""
    if switches.lost:
        check_alive()
    default_generators[device_index(device)].set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    """Return the random state of every index."""
    return [get_rng_state(index) for index in range(DEVICE_COUNT)]


def set_rng_state_all(new_states: list[torch.Tensor]) -> None:
    """Put the states of `get_rng_state_all` back."""
    for index, state in enumerate(new_states):
        set_rng_state(state, index)


@contextmanager
def drawing_from(generator: torch.Generator):
    """Make a CPU kernel that takes no generator draw from `generator` and leave the CPU's own state alone."""
    own = torch.default_generator
    before = own.get_state()
    own.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(own.get_state())
        own.set_state(before)
