"""What the run ran on: python, platform, device and package versions."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "accelerate",
    "peft",
    "numpy",
    "hypothesis",
    "pytest",
)


def describe_environment(device: str) -> dict[str, Any]:
    """The `environment` of a results file.

    Args:
        device: where the cells run.
    """
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device_name(device),
        "packages": packages,
    }


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return f"{device} ({torch.cuda.get_device_name(device)})"
    return device
