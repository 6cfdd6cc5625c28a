"""Free and used memory, and errors about running out of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import sys

import torch

from numerics_suite.core.machine import available_bytes
from numerics_suite.devices.kinds import device_module, kind_of, parts_of

_UNITS = {
    "bytes": 1,
    "b": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
}
_ASKED = re.compile(r"(?:tried to )?allocate\s+(?:memory:\s+)?(\d+(?:\.\d+)?)\s*(\w+)", re.IGNORECASE)


def free_bytes(device: str) -> int:
    """Bytes free on the device, the least of several; for the CPU, those available without swapping."""
    parts = parts_of(device)
    if len(parts) > 1:
        return min(free_bytes(part) for part in parts)
    module = device_module(kind_of(device))
    if hasattr(module, "mem_get_info"):
        # Cached blocks that hold no tensor are torch's to use again.
        cached = module.memory_reserved(device) - module.memory_allocated(device)
        return int(module.mem_get_info(device)[0] + cached)
    if hasattr(module, "recommended_max_memory"):
        return int(module.recommended_max_memory() - module.driver_allocated_memory())
    available = available_bytes()
    if available is not None:
        return available
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2**34


def release(device: str) -> None:
    """Collect reference cycles, then return cached memory to the device and the system.

    A model is full of cycles, and a finding's traceback may end in one; until the collector runs, the next model would
    be loaded beside it. glibc keeps what a cell's answers lay between, 35 MB a cell.
    """
    gc.collect()
    module = device_module(kind_of(device))
    if hasattr(module, "empty_cache"):
        module.empty_cache()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the CPU or of a device.

    torch.OutOfMemoryError is a RuntimeError, and the CPU's allocator raises a plain one: neither must be taken for "the
    op has no such kernel" or "the model refuses this input". A library of CUDA that gets no workspace names its status.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower() if isinstance(error, RuntimeError) else ""
    return any(words in text for words in ("allocate memory", "not enough memory", "out of memory", "alloc_failed"))


def reraise_if_fatal(error: BaseException) -> None:
    """Raise `error` again if memory ran out or the device is lost, which says nothing about the model."""
    if is_out_of_memory(error) or is_device_lost(error):
        raise error


def requested_bytes(error: BaseException) -> int | None:
    """Bytes requested when memory ran out, None if the message does not say."""
    found = _ASKED.search(str(error)) or re.search(r"(\d+)\s*(bytes)", str(error))
    if found is None:
        return None
    return int(float(found.group(1)) * _UNITS.get(found.group(2).lower(), 1))


def out_of_memory_text(error: BaseException, device: str) -> str:
    """One line: bytes asked and bytes free on the device, or on the CPU if its allocator failed.

    Args:
        error: what was raised.
        device: where the cell runs.
    """
    on_cpu = isinstance(error, MemoryError) or "cpuallocator" in str(error).lower()
    where = "cpu" if on_cpu else device
    asked = requested_bytes(error)
    return (
        f"out of memory on {where}: {'unknown' if asked is None else asked} bytes asked, {free_bytes(where)} bytes free"
    )


_LOST = (
    "device-side assert",
    "illegal memory access",
    "launch failure",
    "uncorrectable ecc",
    "device lost",
    "illegal instruction",
)


def is_device_lost(error: BaseException) -> bool:
    """Whether the device has failed for good: after a device-side assert every later call of this process fails too."""
    text = str(error).lower() if isinstance(error, RuntimeError) and not is_out_of_memory(error) else ""
    return any(words in text for words in _LOST)
