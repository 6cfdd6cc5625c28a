"""The available devices, the one that runs the cells, and its capabilities.

Nothing here lists kinds of devices: torch says what it knows (`torch.accelerator`, and the backend that is registered as
PrivateUse1, such as Ascend's `npu`), and a device's capabilities are tried on it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator

import torch

from numerics_suite.core.errors import BadInputError, nearest
from numerics_suite.devices.arithmetic import fix_workspaces
from numerics_suite.devices.kinds import CPU, device_module, kind_of, main_device, parts_of
from numerics_suite.devices.memory import is_out_of_memory
from numerics_suite.devices.precisions import Precision


def is_for_tests(kind: str) -> bool:
    """Whether the backend declares itself a stand-in for an accelerator in tests.

    It runs where `--device` names it, and never counts as the accelerator of this machine.
    """
    return bool(getattr(device_module(kind), "for_tests", False))


def accelerator() -> str | None:
    """The kind of the visible accelerator (`cuda`, `mps`, …), None without one; a stand-in for tests is none."""
    # Two questions: torch 2.6 names the kind that it was built for, whether or not there is one.
    if not torch.accelerator.is_available():
        return None
    found = torch.accelerator.current_accelerator()
    return None if found is None or is_for_tests(found.type) else str(found.type)


def visible_accelerators() -> Iterator[tuple[str, int]]:
    """Kind and number of every accelerator that holds tensors here, one for tests included."""
    kinds = {torch._C._get_privateuse1_backend_name()}  # noqa: SLF001 - torch has no public way to ask
    if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()) is not None:
        kinds.add(found.type)
    for kind in sorted(kinds):
        if count := device_count(kind):
            yield kind, count


def device_count(kind: str) -> int:
    """How many devices of the kind can be used; 1 for the CPU."""
    if kind == CPU:
        return 1
    module = device_module(kind)
    if module is None or not getattr(module, "is_available", bool)():
        return 0
    return int(module.device_count()) if hasattr(module, "device_count") else 1


def resolve_device(name: str, required: str | None = None) -> str:
    """The device of `--device`, once it is known to exist.

    Args:
        name: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, …; several of one kind, with commas, spread a model.
        required: `--require-device`: the kind that must run; a stand-in for tests never counts.

    Raises:
        BadInputError: the device is unknown or absent.
    """
    device = (accelerator() or CPU) if name == "auto" else name
    parts = parts_of(device)
    for part in parts:
        _require_present(part)
    kind = kind_of(device)
    if kind == "cuda":
        fix_workspaces()
    if len(parts) > 1 and (len(set(parts)) < len(parts) or {kind_of(part) for part in parts} != {kind} or kind == CPU):
        message = f"--device {name}: a model is spread over different accelerators of one kind, such as cuda:0,cuda:1"
        raise BadInputError(message)
    if required and (is_for_tests(kind) or kind_of(required) not in {kind, "auto"}):
        message = f"--require-device {required}: the cells would run on '{device}'; torch sees {_seen()}"
        raise BadInputError(message)
    return ",".join(parts)


def _require_present(part: str) -> None:
    kind, _, index = part.partition(":")
    if kind not in _kinds():
        message = f"unknown device '{part}'{nearest(kind, _kinds())} (this torch knows {', '.join(_kinds())})"
        raise BadInputError(message)
    count = device_count(kind)
    if not count:
        message = f"device '{part}' is not available here: torch sees {_seen()}"
        raise BadInputError(message)
    if index and int(index) >= count:
        message = f"device '{part}' is not available here: torch sees {count} of that kind"
        raise BadInputError(message)


@functools.cache
def _kinds() -> tuple[str, ...]:
    """Kinds of devices that this torch knows: each has a module that reports whether it is available."""
    names = {torch._C._get_privateuse1_backend_name()}  # noqa: SLF001 - torch has no public way to ask
    try:
        torch.device("nosuchkind")
    except RuntimeError as error:  # it lists them all
        names.update(str(error).partition("Expected one of")[2].partition(" device type")[0].split(", "))
    found = {name.strip() for name in names}
    return (CPU, *sorted(name for name in found if hasattr(device_module(name), "is_available")))


def _seen() -> str:
    return ", ".join(kind for kind, _ in visible_accelerators()) or "no accelerator"


def default_precisions(device: str) -> tuple[str, ...]:
    """The precisions that the device runs well, which `check` takes when none is named.

    Those with float32 parameters stand next to each other, since their cells share true fp64 passes and gradients.
    """
    kind = kind_of(device)
    bf16 = ("bf16",) if has_bfloat16(device) else ()
    if kind == CPU:
        return ("fp32", "amp-bf16", *bf16)
    if kind == "mps" or not torch.amp.is_autocast_available(kind):
        return ("fp32", "fp16", *bf16) if kind != "mps" else ("fp32", "fp16")
    return ("fp32", "amp-fp16", *(f"amp-{name}" for name in bf16), "fp16", *bf16)


def lacks(recipe: Precision, device: str) -> str | None:
    """Why the device cannot run the precision, None where it can."""
    kind = kind_of(device)
    if recipe.tf32 and not has_tf32(device):
        return f"tf32 needs an NVIDIA GPU of compute capability 8.0 or newer, not {device}"
    if recipe.parameters == "float64" and not has_float64(device):
        return f"{kind} has no float64"
    if recipe.autocast is not None and not torch.amp.is_autocast_available(kind):
        return f"{kind} has no autocast"
    if recipe.computes_in == "bfloat16" and not has_bfloat16(device):
        return f"{device} has no bfloat16"
    return None


def has_tf32(device: str) -> bool:
    """Whether float32 products can be rounded to TF32: NVIDIA's tensor cores from Ampere on, on each of its parts."""
    return (
        kind_of(device) == "cuda"
        and torch.version.hip is None
        and all(torch.cuda.get_device_capability(part)[0] >= 8 for part in parts_of(device))
    )


def has_bfloat16(device: str) -> bool:
    """Whether each part computes in bfloat16 itself; an emulation in float32 rounds otherwise and is none."""
    if kind_of(device) != "cuda":
        return all(_computes_in(part, torch.bfloat16) for part in parts_of(device))

    def native(part: str) -> bool:
        with torch.cuda.device(part):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))

    return all(native(part) for part in parts_of(device))


def has_float64(device: str | torch.device) -> bool:
    """Whether it holds float64; where not, references run on the CPU."""
    return all(_computes_in(part, torch.float64) for part in parts_of(str(device)))


@functools.cache
def _computes_in(device: str, dtype: torch.dtype) -> bool:
    """Whether a product in the dtype runs on the device."""
    if device == CPU:
        return True
    try:
        ones = torch.ones((1, 1), dtype=dtype, device=device)
        return bool((ones @ ones).item() == 1)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        if is_out_of_memory(error):
            raise
        return False


def lacks_attention(attn: str, device: str) -> str | None:
    """Why no model can have this attention implementation on the device, None if it may."""
    if attn != "flash_attention_2":
        return None
    if kind_of(device) == CPU:
        return f"flash_attention_2 runs on an accelerator only, not on {device}"
    if kind_of(device) == "cuda" and importlib.util.find_spec("flash_attn") is None:
        return "flash_attention_2 needs the package flash-attn"
    return None


def describe_device(device: str) -> str:
    """The device, with the accelerator's model if its backend reports it."""
    named = getattr(device_module(kind_of(device)), "get_device_name", None)
    return device if named is None else f"{device} ({named(main_device(device))})"


def processor_of(device: str) -> str:
    """What computes besides the CPU: the model of an accelerator, else its kind; empty for the CPU."""
    kind = kind_of(device)
    named = getattr(device_module(kind), "get_device_name", None)
    return str(named(main_device(device))) if named is not None else "" if kind == CPU else kind
