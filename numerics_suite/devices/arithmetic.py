"""Switches that change how a device rounds: TF32, reduced-precision reductions, deterministic algorithms, autocast.

Each is set by a context manager that restores the user's setting, after an error too. They cover the forward and
the backward pass: a backward pass of a float32 cell whose products round to TF32 is no float32.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from numerics_suite.devices.kinds import CPU, kind_of, parts_of

_FP32_SWITCHES = tuple((backend, op) for backend in ("cuda", "mkldnn") for op in ("matmul", "conv", "rnn"))
_REDUCTIONS = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
OFF, WARN = 0, 1
"""Two of torch's deterministic debug modes: no demand; an op without a deterministic kernel warns."""


@contextlib.contextmanager
def switches(*, tf32: bool, device: str) -> Iterator[None]:
    """The switches of one cell, around its forward or its backward pass.

    Products of 16-bit floats accumulate in float32 to the end: cuBLAS may add the parts of a split sum in 16 bits, which
    is one more rounding than the budgets count. On an accelerator kernels with a fixed order of summation are preferred,
    where there are some: atomics add in another order in each run.

    Args:
        tf32: float32 products and convolutions may round their inputs to 10 bits.
        device: where the cell runs.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_fp32_precision(tf32=tf32))
        stack.enter_context(_full_reductions())
        if kind_of(device) != CPU:
            stack.enter_context(deterministic_algorithms())
        yield


@contextlib.contextmanager
def torch_default_dtype(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Set torch's default dtype within, None for the present one; restored on exit."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype or before)
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Restore all switches on exit, such as those that a script sets, and the default dtype."""
    with torch_default_dtype(), _fp32_precision(tf32=False), _full_reductions(), deterministic_algorithms():
        yield


@contextlib.contextmanager
def _fp32_precision(*, tf32: bool) -> Iterator[None]:
    """What float32 products compute in, on CUDA and in oneDNN, which rounds them to bfloat16 if the user lets it.

    torch has two interfaces to these switches and, from 2.9 on, raises where one is read after the other was written.
    The accessors below both of them can be read in any state.
    """
    getter = getattr(torch._C, "_get_fp32_precision_getter", None)  # noqa: SLF001 - the public ones raise, see above
    if getter is None:
        with _old_fp32_precision(tf32=tf32):
            yield
        return
    setter: Any = torch._C._set_fp32_precision_setter  # noqa: SLF001 - as above
    before = {switch: getter(*switch) for switch in _FP32_SWITCHES}
    legacy = _legacy_precision()
    try:
        # First through the old interface, so that whoever reads it within finds the two in agreement.
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        for backend, op in _FP32_SWITCHES:
            setter(backend, op, "tf32" if tf32 and backend == "cuda" else "ieee")
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for (backend, op), value in before.items():
            setter(backend, op, value)


def _legacy_precision() -> str | None:
    """The old interface's word, None where the user has set the new one to something else."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


@contextlib.contextmanager
def _old_fp32_precision(*, tf32: bool) -> Iterator[None]:
    """The same before torch 2.9."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextlib.contextmanager
def _full_reductions() -> Iterator[None]:
    """CuBLAS adds up in float32 to the end."""
    matmul: Any = torch.backends.cuda.matmul
    before = {name: getattr(matmul, name) for name in _REDUCTIONS if hasattr(matmul, name)}
    try:
        for name in before:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


@contextlib.contextmanager
def deterministic_algorithms(*, fill: bool = False) -> Iterator[None]:
    """Prefer kernels that give the same bits in every run; an op that has none warns once and runs.

    Args:
        fill: uninitialised memory holds NaN, or the largest integer.
    """
    mode = torch.get_deterministic_debug_mode()
    deterministic: Any = torch.utils.deterministic
    filled = deterministic.fill_uninitialized_memory
    try:
        _set_deterministic(WARN)
        deterministic.fill_uninitialized_memory = fill
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*", category=UserWarning)
            yield
    finally:
        deterministic.fill_uninitialized_memory = filled
        _set_deterministic(mode)


def _set_deterministic(mode: int) -> None:
    """Set a deterministic debug mode of torch, 0 to 2 (https://docs.pytorch.org/docs/stable/generated/torch.set_deterministic_debug_mode.html).

    `torch.use_deterministic_algorithms` imports the compiler, three seconds of CPU time, to inform it; so it is called
    only if the compiler is loaded.
    """
    if "torch._inductor" in sys.modules:
        torch.use_deterministic_algorithms(mode != OFF, warn_only=mode == WARN)
    else:
        torch.set_deterministic_debug_mode(mode)


def fix_workspaces() -> None:
    """Give cuBLAS workspaces of fixed sizes, without which its products may differ from run to run.

    Source: https://docs.nvidia.com/cuda/cublas/#results-reproducibility. It is read when CUDA starts, so this comes first.
    """
    os.environ.setdefault(WORKSPACE, ":4096:8")


# --- autocast ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def autocast(device: str | torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast to `dtype` on the kind of device; None leaves autocast as it is."""
    if dtype is None:
        yield
        return
    with torch.autocast(kind_of(device), dtype=dtype):
        yield


@contextlib.contextmanager
def autocast_off(*devices: str | torch.device, keeps_casts: bool = True) -> Iterator[None]:
    """No autocast on these kinds of devices and on the CPU.

    Args:
        devices: their kinds.
        keeps_casts: inner sections keep their cast weights until this one ends.
    """
    with contextlib.ExitStack() as stack:
        for kind in sorted({CPU, *(kind_of(device) for device in devices)}):
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=keeps_casts))
        yield


def autocast_dtypes(*devices: str | torch.device) -> dict[str, torch.dtype]:
    """The dtype of the autocast section that is open, by kind: of these devices and of the CPU; none outside one."""
    kinds = dict.fromkeys((*(kind_of(device) for device in devices), CPU))
    return {
        kind: torch.get_autocast_dtype(kind)
        for kind in kinds
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    }


@contextlib.contextmanager
def autocast_as(dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Reopen the sections of :func:`autocast_dtypes`."""
    with contextlib.ExitStack() as stack:
        for kind, dtype in dtypes.items():
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        yield


def casts_on(device: str | torch.device) -> bool:
    """Whether an autocast section is open on the kind of device."""
    return kind_of(device) in autocast_dtypes(device)


def grad_scaler(device: str, *, enabled: bool, init_scale: float | None = None) -> torch.amp.GradScaler:
    """A GradScaler for the kind of device, with torch's defaults but for `init_scale`."""
    scale: dict[str, Any] = {} if init_scale is None else {"init_scale": init_scale}
    return torch.amp.GradScaler(kind_of(parts_of(device)[0]), enabled=enabled, **scale)
