"""Which device runs the cells, and what surrounds a pass on it."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from types import SimpleNamespace
from typing import NoReturn

import pytest
import torch

from numerics_suite.core.errors import BadInputError
from numerics_suite.devices import arithmetic, memory
from numerics_suite.devices.device import accelerator, resolve_device


def refused() -> NoReturn:
    """As torch 2.6, built for CUDA, answers on a machine without one."""
    message = "Cannot access accelerator device when none is available."
    raise RuntimeError(message)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", refused)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_xpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    module = SimpleNamespace(is_available=lambda: True, device_count=lambda: 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch, "xpu", module)
    return module


@pytest.mark.usefixtures("without")
def test_without_an_accelerator_the_cpu_runs_and_torch_is_not_asked_for_its_kind() -> None:
    assert accelerator() is None
    assert resolve_device("auto") == "cpu"
    with pytest.raises(BadInputError, match="torch sees no accelerator"):
        resolve_device("cuda")


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cdua", "unknown device 'cdua'; did you mean 'cuda'"),
        ("npu", "unknown device 'npu'"),
        ("meta", "unknown device 'meta'"),
        ("cuda:0,mps", "device 'cuda:0' is not available here"),
    ],
)
def test_a_device_that_is_unknown_or_absent_is_bad_input(name: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        resolve_device(name)


@pytest.mark.usefixtures("two_xpus")
def test_an_accelerator_is_taken_where_there_is_one() -> None:
    assert resolve_device("auto") == "xpu"
    assert resolve_device("xpu:0, xpu:1") == "xpu:0,xpu:1"
    with pytest.raises(BadInputError, match="torch sees 2 of that kind"):
        resolve_device("xpu:2")
    for wrong in ("xpu:0,xpu:0", "xpu:0,cpu", "cpu,xpu:0"):
        with pytest.raises(BadInputError, match="different accelerators of one kind"):
            resolve_device(wrong)


def test_a_stand_in_for_tests_runs_by_its_name_and_counts_as_no_accelerator(two_xpus: SimpleNamespace) -> None:
    two_xpus.for_tests = True
    assert accelerator() is None
    assert resolve_device("auto") == "cpu"
    assert resolve_device("xpu") == "xpu"
    for device in ("xpu", "auto"):
        with pytest.raises(BadInputError, match="--require-device xpu"):
            resolve_device(device, required="xpu")


# --- arithmetic ----------------------------------------------------------------------------------------------------


def fp32_switches() -> list[str]:
    return [
        torch._C._get_fp32_precision_getter(backend, op)
        for backend in ("cuda", "mkldnn")
        for op in ("matmul", "conv", "rnn")
    ]


@pytest.fixture
def user_switches():
    """Puts back what a test does in the user's name."""
    with arithmetic.kept():
        yield


SETTINGS = {
    "nothing": lambda: None,
    "the new interface": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "every backend": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "the old interface": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}


@pytest.mark.usefixtures("user_switches")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("tf32", [False, True])
def test_switches_hold_whatever_the_user_has_set_and_come_back_after_an_error(setting: str, *, tf32: bool) -> None:
    SETTINGS[setting]()
    before = fp32_switches(), torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    with contextlib.suppress(KeyError), arithmetic.switches(tf32=tf32, device="cpu"):
        # A convolution rounds its inputs to TF32 by default, and oneDNN a product to bfloat16 after `medium`.
        assert fp32_switches() == [*(["tf32" if tf32 else "ieee"] * 3), *(["ieee"] * 3)]
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
        assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        raise KeyError
    assert (fp32_switches(), torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction) == before


def test_deterministic_algorithms_belong_to_accelerators_and_are_restored() -> None:
    with arithmetic.switches(tf32=False, device="cpu"):
        assert not torch.are_deterministic_algorithms_enabled()
    with contextlib.suppress(KeyError), arithmetic.switches(tf32=False, device="cuda:1"):
        assert torch.are_deterministic_algorithms_enabled()
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


# --- memory --------------------------------------------------------------------------------------------------------

CUDA_TEXT = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 3.00 MiB is free."


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (torch.OutOfMemoryError(CUDA_TEXT), 20 * 2**20),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), 4096),
        (MemoryError(), None),
    ],
)
def test_running_out_of_memory_is_told_from_a_refusal(error: Exception, asked: int | None) -> None:
    assert memory.is_out_of_memory(error)
    assert memory.requested_bytes(error) == asked
    assert "bytes free" in memory.out_of_memory_text(error, "cpu")
    with pytest.raises(type(error)):
        memory.reraise_if_fatal(error)


@pytest.mark.parametrize(
    "text", ["not implemented for 'Double'", "Expected tensor for argument #1 to have scalar type Long"]
)
def test_a_refusal_is_no_lack_of_memory(text: str) -> None:
    assert not memory.is_out_of_memory(RuntimeError(text))
    assert not memory.is_device_lost(RuntimeError(text))
    memory.reraise_if_fatal(RuntimeError(text))


def test_a_device_side_assert_loses_the_device() -> None:
    error = RuntimeError("CUDA error: device-side assert triggered")
    assert memory.is_device_lost(error)
    with pytest.raises(RuntimeError):
        memory.reraise_if_fatal(error)


def test_deterministic_algorithms_leave_the_compiler_unloaded() -> None:
    code = (
        "import sys, torch\n"
        "from numerics_suite.devices.arithmetic import deterministic_algorithms\n"
        "with deterministic_algorithms():\n"
        "    print(torch.is_deterministic_algorithms_warn_only_enabled())\n"
        "print(torch.are_deterministic_algorithms_enabled(), 'torch._inductor' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "False", "False"]
