"""Asynchronous copies from a device to the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from numerics_suite.devices.kinds import CPU, device_module


def copy_to_host(tensor: Tensor) -> tuple[Tensor, Any]:
    """Begin to copy a tensor to the host.

    Returns:
        The tensor on the host, and the event after which it may be read; None where it may be read at once. Reading it
        earlier gives the memory's old contents.
    """
    if tensor.device.type == CPU:
        return tensor, None
    module = device_module(tensor.device.type)
    if not hasattr(module, "Event") or not hasattr(module, "current_stream"):
        return tensor.cpu(), None  # without events a copy has to be waited for
    # The device is named, since the user may have set another default for new tensors.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device=CPU, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = module.Event()
    event.record(module.current_stream(tensor.device))
    return host, event


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has finished all its work; does nothing on the CPU."""
    kind = torch.device(device).type
    module = device_module(kind)
    if hasattr(module, "synchronize"):
        module.synchronize(device) if kind == "cuda" else module.synchronize()
