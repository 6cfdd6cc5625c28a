"""Names of devices, and torch's module for each kind of device."""

from __future__ import annotations

from typing import Any

import torch

CPU = "cpu"


def kind_of(device: str | torch.device) -> str:
    """`cuda` of `cuda:1`, and of `cuda:0,cuda:1`."""
    return str(device).partition(",")[0].partition(":")[0]


def parts_of(device: str) -> tuple[str, ...]:
    """`cuda:0` and `cuda:1` of `cuda:0,cuda:1`, over which a model is spread; one part elsewhere."""
    return tuple(part.strip() for part in device.split(","))


def main_device(device: str) -> str:
    """The device that a model's inputs go to: the first of several."""
    return parts_of(device)[0]


def device_module(kind: str) -> Any:
    """`torch.cuda` of `cuda`; None for the CPU and for kinds whose backend has no module of its own."""
    return None if kind == CPU else getattr(torch, kind, None)
