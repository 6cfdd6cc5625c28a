"""What may mix, the two indices, the device module, and the ways in which a device fails."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

CPU = torch.ones(3, 3)
MIXED = "Expected all tensors to be on the same device, but found at least two devices, standin:0 and {}!"


def test_the_device_is_the_accelerator_that_torch_sees():
    assert torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() == torch.device("standin")
    assert torch.accelerator.device_count() == torch.standin.device_count() == 2
    assert torch.get_device_module("standin") is torch.standin
    assert torch.standin.is_available()


def test_the_module_says_that_it_is_for_tests():
    assert torch.standin.for_tests is True
    assert not hasattr(torch.cuda, "for_tests")


@pytest.mark.parametrize(
    "mix",
    [
        lambda device, other: device + other,
        lambda device, other: other + device,
        lambda device, other: device @ other,
        lambda device, other: other.add_(device),
        lambda device, other: device.add_(other),
        lambda device, other: torch.cat([device, other]),
        lambda device, other: torch.where(device > 0, other, device),
        nn.functional.linear,
        lambda device, other: nn.functional.layer_norm(device, (3,), other[0]),
        lambda device, other: nn.functional.embedding(other.long(), device),
        lambda device, other: device.index_select(0, other[0].long()),
        lambda device, other: device.gather(0, other.long()),
        lambda device, other: torch.add(device, device, out=other),
        lambda device, other: nn.functional.cross_entropy(device, other[0].long()),
    ],
)
@pytest.mark.parametrize("other", ["cpu", "standin:1"])
def test_devices_do_not_mix(mix, other):
    device = torch.ones(3, 3, device="standin:0")
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device, but found at least two"):
        mix(device, CPU.to(other, copy=True))
    with pytest.raises(RuntimeError, match=MIXED.format(other)):
        device.mul(CPU.to(other))


def test_what_cuda_lets_mix():
    device = torch.ones(3, 3, device="standin")
    assert (device * torch.tensor(2.0)).device == device.device
    assert (torch.tensor(2.0, dtype=torch.float64) - device).dtype is torch.float32
    assert torch.where(device > 0, device, torch.tensor(0.0)).sum() == 9
    index = torch.tensor([0, 2])
    assert device[index].shape == (2, 3)
    device[index] = torch.zeros(3, device="standin")
    device[torch.tensor([True, False, False])] = 4.0
    assert device[:, 0].tolist() == [4, 1, 0]
    with pytest.raises(RuntimeError, match="found at least two devices"):
        torch.tensor(1.0).add_(device[0, 0])
    with pytest.raises(RuntimeError, match="indices should be either on cpu or on the same device"):
        CPU[index.to("standin")]
    assert CPU.clone().copy_(device).device.type == "cpu"
    assert device.to("standin:1").device == torch.device("standin:1")
    assert torch.empty(3, 3, device="standin:1").copy_(device).sum() == device.sum().item()


def test_the_current_index():
    assert torch.standin.current_device() == torch.accelerator.current_device_index() == 0
    with torch.standin.device(1):
        assert torch.ones(2, device="standin").device == torch.device("standin:1")
        assert torch.accelerator.current_device_index() == 1
        assert torch.ones(2).standin().device.index == 1
    with torch.accelerator.device_index(1):
        assert torch.standin.current_device() == 1
    torch.standin.set_device("standin:1")
    torch.standin.set_device(0)
    assert torch.ones(2, device="standin").device.index == 0
    for wrong in (2, "standin:7"):
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.standin.set_device(wrong)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.ones(2, device="standin:2")


def test_a_lost_device_is_lost_for_good():
    held = torch.ones(2, device="standin")
    torch.standin.lose_device(after=1)
    try:
        held + 1
        for use in (
            lambda: held + 1,
            held.cpu,
            held.sum,
            lambda: held[0],
            lambda: torch.ones(1, device="standin"),
            lambda: torch.ones(1).to("standin:1"),
            torch.standin.synchronize,
            torch.standin.get_rng_state,
            torch.standin.Event().record,
        ):
            with pytest.raises(torch.AcceleratorError, match="device-side assert triggered"):
                use()
    finally:
        torch.standin.restore_device()
    assert held.sum() == 2


def test_an_index_out_of_range_may_lose_the_device():
    table = torch.ones(3, 2, device="standin")
    with pytest.raises(IndexError):
        nn.functional.embedding(torch.tensor([5], device="standin"), table)
    torch.standin.set_index_asserts(True)
    try:
        with pytest.raises(torch.AcceleratorError, match="device-side assert triggered"):
            nn.functional.embedding(torch.tensor([5], device="standin"), table)
        with pytest.raises(torch.AcceleratorError, match="device-side assert triggered"):
            table + 1
    finally:
        torch.standin.restore_device()
        torch.standin.set_index_asserts(False)


def test_float64_may_be_missing():
    single = torch.ones(2, device="standin")
    with torch.standin.no_float64():
        for make in (
            single.double,
            lambda: torch.ones(2, dtype=torch.float64, device="standin"),
            lambda: torch.ones(2, dtype=torch.float64).to("standin"),
            lambda: nn.Linear(2, 2).double().to("standin"),
        ):
            with pytest.raises(TypeError, match="float64"):
                make()
        assert (single * 2.5).tolist() == [2.5, 2.5]
    assert single.double().dtype is torch.float64


def test_child_processes_inherit_the_device_and_its_switches():
    script = """
import torch
switches = torch.standin.switches
print(torch.ones(2).to("standin").device, switches.fused_noise, switches.float64, switches.kernels_left)
torch.ones(4096, device="standin")
"""
    switches = {
        "NUMERICS_STANDIN_MEMORY": "8192",
        "NUMERICS_STANDIN_FUSED_NOISE": "0.05",
        "NUMERICS_STANDIN_NO_FLOAT64": "1",
        "NUMERICS_STANDIN_LOST_AFTER": "50",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | switches, capture_output=True, text=True, check=False
    )
    device, noise, float64, left = done.stdout.split()
    assert (device, noise, float64) == ("standin:0", "0.05", "False")
    assert 0 < int(left) < 50
    assert "OutOfMemoryError: standin out of memory. Tried to allocate 16.00 KiB" in done.stderr
