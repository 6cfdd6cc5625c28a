"""The environment of a run: Python, platform, device and package versions."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

from numerics_suite.core.extensions import extension_versions
from numerics_suite.devices.device import describe_device, processor_of

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "accelerate",
    "peft",
    "trl",
    "numpy",
    "hypothesis",
    "pytest",
)


def package_versions() -> dict[str, str]:
    """Versions of those of :data:`PACKAGES` that are installed."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return packages


def describe_run(device: str) -> dict[str, Any]:
    """The `environment` of a results file, including the packages that extend the run.

    A baseline leaves these out: there, any difference between environments may explain different rounding.

    Args:
        device: where the cells run.
    """
    return {**describe_environment(device), "extensions": extension_versions()}


def describe_environment(device: str) -> dict[str, Any]:
    """What the numbers of a cell may depend on; recorded in a baseline, so that a comparison can report differences.

    Args:
        device: where the cells run.
    """
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": describe_device(device),
        "packages": package_versions(),
    }


def describe_machine(device: str) -> dict[str, Any]:
    """What determines the order and rounding of sums: processor, its vector instructions, threads, accelerator.

    Args:
        device: where a cell runs.
    """
    import torch

    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "accelerator": processor_of(device),
    }


def _processor() -> str:
    """The processor's model where the system reports it, else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
