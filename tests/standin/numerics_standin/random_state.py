"""The random states of the device, one for each index, apart from the CPU's."""

from __future__ import annotations

import weakref
from contextlib import contextmanager

import torch

from numerics_standin.memory import NAME
from numerics_standin.streams import device_index
from numerics_standin.switches import DEVICE_COUNT, check_alive, switches

_DEFAULT_SEED = 67280421310721  # what torch's own generators start with

_CpuGenerator = torch.Generator


class DeviceGenerator(_CpuGenerator):
    """A generator of the device: a CPU generator, since the kernels run there, that says what it belongs to."""

    @property
    def device(self) -> torch.device:
        """The device whose kernels may draw from it."""
        return self.standin_device


class _AnyGenerator(type(_CpuGenerator)):
    """Makes `isinstance(generator, torch.Generator)` hold for generators of every device."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _CpuGenerator)


class Generator(_CpuGenerator, metaclass=_AnyGenerator):
    """Takes the place of `torch.Generator`: PyTorch cannot ask a Python backend for a generator."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        """Make a generator for `device`."""
        device = torch.device(device)
        if device.type != NAME:
            return _CpuGenerator(device=device)
        generator = DeviceGenerator(device="cpu")
        generator.standin_device = torch.device(NAME, device_index(device))
        generator.manual_seed(_DEFAULT_SEED)
        _of_device[generator._cdata] = generator
        return generator


_of_device: weakref.WeakValueDictionary[int, DeviceGenerator] = weakref.WeakValueDictionary()


def belongs_to(generator: torch.Generator, index: int) -> bool:
    """Whether a kernel of `index` may draw from it. A kernel is given another Python object for the same generator."""
    owner = _of_device.get(generator._cdata)
    return owner is not None and owner.standin_device.index == index


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
