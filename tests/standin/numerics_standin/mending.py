"""Where PyTorch's Python code expects of a device what a Python backend cannot give, and what it gets instead."""

from __future__ import annotations

from typing import Any

import torch

from numerics_standin import streams
from numerics_standin.memory import NAME
from numerics_standin.random_state import Generator


def mend() -> None:
    """Change torch where it must be changed."""
    torch.Generator = Generator
    _storages()
    _accelerator()


def _storages() -> None:
    make = torch.UntypedStorage.__new__

    def new(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> torch.UntypedStorage:
        # PyTorch looks for an allocator in C++, finds none and crashes.
        if device is None or torch.device(device).type != NAME:
            return make(cls, *args, **kwargs) if device is None else make(cls, *args, device=device, **kwargs)
        size = args[0] if args and isinstance(args[0], int) else len(args[0]) if args else 0
        tensor = torch.empty(size, dtype=torch.uint8, device=device)
        if args and not isinstance(args[0], int):
            tensor.copy_(torch.tensor(args[0], dtype=torch.uint8, device="cpu"))
        return tensor.untyped_storage()

    torch.UntypedStorage.__new__ = staticmethod(new)


def _accelerator() -> None:
    """Let torch.accelerator know the current index, which PyTorch's Python guard says is 0."""
    from numerics_standin import device_module

    accelerator = torch.accelerator
    accelerator.current_device_index = streams.current_device
    accelerator.current_device_idx = streams.current_device
    accelerator.set_device_index = streams.set_device
    accelerator.set_device_idx = streams.set_device
    accelerator.synchronize = streams.synchronize
    accelerator.current_stream = streams.current_stream
    accelerator.set_stream = streams.set_stream
    accelerator.empty_cache = device_module.empty_cache
    accelerator.memory_allocated = device_module.memory_allocated
    accelerator.memory_reserved = device_module.memory_reserved
    accelerator.max_memory_allocated = device_module.max_memory_allocated
    accelerator.max_memory_reserved = device_module.max_memory_reserved
    accelerator.memory_stats = device_module.memory_stats
    accelerator.reset_peak_memory_stats = device_module.reset_peak_memory_stats
