"""`torch.standin`: what `torch.cuda` is to CUDA. For tests only, and `for_tests` says so."""

from __future__ import annotations

import torch

from numerics_standin.memory import accounts
from numerics_standin.random_state import (
    Generator,
    default_generators,
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)
from numerics_standin.streams import (
    Event,
    Stream,
    current_device,
    current_stream,
    default_stream,
    device_index,
    set_device,
    set_stream,
    stream,
    synchronize,
)
from numerics_standin.switches import (
    DEVICE_COUNT,
    fused_noise,
    lose_device,
    memory_limit,
    no_float64,
    restore_device,
    set_float64_support,
    set_fused_noise,
    set_index_asserts,
    set_late_copies,
    set_memory_limit,
    switches,
)

__all__ = [
    "Event",
    "Generator",
    "Stream",
    "current_device",
    "current_stream",
    "default_generators",
    "default_stream",
    "device",
    "device_count",
    "empty_cache",
    "for_tests",
    "fused_noise",
    "get_amp_supported_dtype",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "get_rng_state_all",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "lose_device",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_limit",
    "memory_reserved",
    "memory_stats",
    "no_float64",
    "reset_peak_memory_stats",
    "restore_device",
    "seed",
    "seed_all",
    "set_device",
    "set_float64_support",
    "set_fused_noise",
    "set_index_asserts",
    "set_late_copies",
    "set_memory_limit",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
]

for_tests = True
"""This device only stands in for one. A program that picks the accelerator it finds passes over a module with this."""


_initialized = True
"""Checkpointing keeps the device's random state only if this says that there is one."""


def is_available() -> bool:
    """Whether it can be used."""
    return True


def is_initialized() -> bool:
    """Whether it was used."""
    return True


def init() -> None:
    """Do nothing; CUDA's module has it."""


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    """Return the number of indices."""
    return DEVICE_COUNT


def get_device_name(device: object = None) -> str:
    """Return the name of `device`."""
    return f"Stand-in {device_index(device)}"


class DeviceProperties:
    """What `get_device_properties` returns."""

    def __init__(self, index: int) -> None:
        self.name = get_device_name(index)
        self.total_memory = switches.capacity
        self.major = 0
        self.minor = 0


def get_device_properties(device: object = None) -> DeviceProperties:
    """Return name and memory of `device`."""
    return DeviceProperties(device_index(device))


def get_device_capability(device: object = None) -> tuple[int, int]:
    """Return (0, 0)."""
    return 0, 0


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Return the dtypes of autocast."""
    return [torch.bfloat16, torch.float16]


def is_bf16_supported(including_emulation: bool = True) -> bool:
    """Whether it has bfloat16."""
    return True


class device:  # noqa: N801 - as torch.cuda.device
    """Context manager: makes a device current; None or a negative index changes nothing."""

    def __init__(self, device: object) -> None:
        nothing = device is None or (isinstance(device, int) and device < 0)
        self.idx = -1 if nothing else device_index(device)
        self.prev_idx = -1

    def __enter__(self) -> None:
        """Make it current."""
        self.prev_idx = current_device()
        if self.idx >= 0:
            set_device(self.idx)

    def __exit__(self, *_: object) -> None:
        """Put back what was current."""
        set_device(self.prev_idx)


class device_of(device):  # noqa: N801 - as torch.cuda.device_of
    """Context manager: makes the device of a tensor current."""

    def __init__(self, obj: torch.Tensor) -> None:
        super().__init__(obj.get_device())


def memory_allocated(device: object = None) -> int:
    """Return the bytes of the tensors that live on `device`."""
    return accounts[device_index(device)].allocated


def memory_reserved(device: object = None) -> int:
    """Return the same; nothing is cached."""
    return memory_allocated(device)


def max_memory_allocated(device: object = None) -> int:
    """Return the most bytes that `device` has held since the last reset."""
    return accounts[device_index(device)].peak


def max_memory_reserved(device: object = None) -> int:
    """Return the same; nothing is cached."""
    return max_memory_allocated(device)


def reset_peak_memory_stats(device: object = None) -> None:
    """Begin to look for the most bytes from now on."""
    account = accounts[device_index(device)]
    account.peak = account.allocated


def memory_stats(device: object = None) -> dict[str, int]:
    """Return the figures by the names that torch.cuda has for them."""
    account = accounts[device_index(device)]
    return {
        "allocated_bytes.all.current": account.allocated,
        "allocated_bytes.all.peak": account.peak,
        "allocation.all.allocated": account.allocations,
        "reserved_bytes.all.current": account.allocated,
        "reserved_bytes.all.peak": account.peak,
    }


def mem_get_info(device: object = None) -> tuple[int, int]:
    """Return the bytes that are free and the bytes in all."""
    return max(0, switches.capacity - memory_allocated(device)), switches.capacity


def empty_cache() -> None:
    """Do nothing; nothing is cached."""
