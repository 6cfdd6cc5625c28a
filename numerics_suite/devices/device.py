"""Which device runs the cells, and what it runs well."""

from __future__ import annotations

import importlib.util
import re

import torch

from numerics_suite.core.errors import BadInputError
from numerics_suite.devices.precisions import Precision

DEVICE_PATTERN = re.compile(r"(auto|cpu|mps|(cuda|xpu|npu|hpu|mlu|musa)(:\d+)?)")


def accelerator() -> str | None:
    """The kind of the visible accelerator (`cuda`, `mps`, …), None without one."""
    # Asked in two calls: torch 2.6 names the kind that it was built for, whether or not there is one.
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None else str(found.type)


def resolve_device(name: str, required: str | None = None) -> str:
    """The device of `--device`, once it is known to exist.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, …
        required: `--require-device`: the kind that must be what runs.

    Raises:
        BadInputError: the device is unknown or absent.
    """
    if not DEVICE_PATTERN.fullmatch(name):
        message = f"unknown device '{name}': use auto, cpu, cuda, cuda:N or mps"
        raise BadInputError(message)
    present = accelerator()
    device = (present or "cpu") if name == "auto" else name
    kind, _, index = device.partition(":")
    if kind not in {"cpu", present}:
        message = f"device '{device}' is not available here: torch sees {present or 'no accelerator'}"
        raise BadInputError(message)
    if index and int(index) >= torch.accelerator.device_count():
        message = f"device '{device}' is not available here: torch sees {torch.accelerator.device_count()} of that kind"
        raise BadInputError(message)
    if required and required.partition(":")[0] not in {kind, "auto"}:
        message = (
            f"--require-device {required}: the cells would run on '{device}'; torch sees {present or 'no accelerator'}"
        )
        raise BadInputError(message)
    return device


def default_precisions(device: str) -> tuple[str, ...]:
    """The precisions that the device runs well, which `check` takes when none is named."""
    if device.startswith("cuda"):
        bf16 = ("bf16", "amp-bf16") if torch.cuda.is_bf16_supported() else ()
        return ("fp32", "fp16", "amp-fp16", *bf16)
    if device.startswith("mps"):
        return ("fp32", "fp16")
    return ("fp32", "bf16", "amp-bf16")


def lacks(recipe: Precision, device: str) -> str | None:
    """Why the device cannot run the precision, None where it can."""
    if recipe.tf32 and not (device.startswith("cuda") and torch.cuda.get_device_capability(device)[0] >= 8):
        return f"tf32 needs an NVIDIA GPU of compute capability 8.0 or newer, not {device}"
    if recipe.parameters == "float64" and device.startswith("mps"):
        return "mps has no float64"
    if recipe.computes_in == "bfloat16" and device.startswith("cuda") and not torch.cuda.is_bf16_supported():
        return f"{device} has no bfloat16"
    return None


def lacks_attention(attn: str, device: str) -> str | None:
    """Why the attention implementation cannot be had on the device whatever the model, None where it may."""
    if attn != "flash_attention_2":
        return None
    if not device.startswith("cuda"):
        return f"flash_attention_2 runs on CUDA devices only, not {device}"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash_attention_2 needs the package flash-attn"
    return None
