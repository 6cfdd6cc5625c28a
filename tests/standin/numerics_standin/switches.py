"""What a test may make the device do: each switch has a function and, for child processes, an environment variable."""

from __future__ import annotations

import os
from contextlib import contextmanager

import torch

DEVICE_COUNT = 2
DEFAULT_CAPACITY = 8 << 30


class Switches:
    """The switches, read once from the environment and changed by the functions below."""

    def __init__(self) -> None:
        environment = os.environ
        self.capacity = int(environment.get("NUMERICS_STANDIN_MEMORY", DEFAULT_CAPACITY))
        self.fused_noise = float(environment.get("NUMERICS_STANDIN_FUSED_NOISE", "0"))
        self.float64 = environment.get("NUMERICS_STANDIN_NO_FLOAT64", "0") in {"", "0"}
        self.late_copies = environment.get("NUMERICS_STANDIN_LATE_COPIES", "1") not in {"", "0"}
        self.index_asserts = environment.get("NUMERICS_STANDIN_INDEX_ASSERTS", "0") not in {"", "0"}
        self.kernels_left = int(environment.get("NUMERICS_STANDIN_LOST_AFTER", "-1"))
        self.lost = False


switches = Switches()


def set_memory_limit(size: int | None) -> None:
    """Give each device `size` bytes of memory; None: the default of 8 GiB."""
    switches.capacity = DEFAULT_CAPACITY if size is None else size


def set_fused_noise(relative: float) -> None:
    """Make each result of the fused attention kernel wrong by up to `relative`; 0 makes it right again."""
    switches.fused_noise = relative


def set_float64_support(supported: bool) -> None:
    """Refuse float64 tensors as MPS does, or accept them again."""
    switches.float64 = supported


def set_late_copies(late: bool) -> None:
    """Let non-blocking copies to the CPU complete at a synchronization only, or at once."""
    switches.late_copies = late


def set_index_asserts(asserts: bool) -> None:
    """Lose the device at an index out of range, as CUDA does, or raise IndexError as the CPU does."""
    switches.index_asserts = asserts


def lose_device(after: int = 0) -> None:
    """Lose the device for good after `after` more kernels: every later one raises "device-side assert triggered"."""
    switches.kernels_left = after


def restore_device() -> None:
    """Undo `lose_device`. No real device can do this; a test of several losses in one process can."""
    switches.kernels_left = -1
    switches.lost = False


@contextmanager
def _restored(name: str, value: object):
    before = getattr(switches, name)
    setattr(switches, name, value)
    try:
        yield
    finally:
        setattr(switches, name, before)


def memory_limit(size: int):
    """Context manager: `set_memory_limit` for the while."""
    return _restored("capacity", size)


def fused_noise(relative: float):
    """Context manager: `set_fused_noise` for the while."""
    return _restored("fused_noise", relative)


def no_float64():
    """Context manager: `set_float64_support(False)` for the while."""
    return _restored("float64", False)


def check_alive() -> None:
    """Count one kernel.

    Raises:
        torch.AcceleratorError: The device is lost, or is lost by this kernel.
    """
    if switches.kernels_left >= 0:
        if switches.kernels_left == 0:
            switches.lost = True
        else:
            switches.kernels_left -= 1
    if switches.lost:
        raise_lost()


def raise_lost() -> None:
    """Lose the device and raise what every later kernel raises."""
    switches.lost = True
    switches.kernels_left = 0
    message = (
        "standin error: device-side assert triggered\n"
        "standin kernel errors might be asynchronously reported at some other API call, "
        "so the stacktrace below might be incorrect."
    )
    raise torch.AcceleratorError(message)
