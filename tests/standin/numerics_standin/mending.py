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
    """Let torch.accelerator know the current index and streams, of which PyTorch's Python guard has one each.

    Its memory figures are left as they are: they fail for every Python backend, and programs have to know.
    """

    def exchange(index: int) -> int:
        before = streams.current_device()
        if index >= 0:
            streams.set_device(index)
        return before

    torch._C._accelerator_getDeviceIndex = streams.current_device
    torch._C._accelerator_setDeviceIndex = streams.set_device
    torch._C._accelerator_exchangeDevice = exchange
    torch._C._accelerator_maybeExchangeDevice = exchange
    torch._C._accelerator_getStream = streams.current_stream
    torch._C._accelerator_setStream = streams.set_stream
    torch._C._accelerator_synchronizeDevice = streams.synchronize
