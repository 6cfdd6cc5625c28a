"""One index of several, a model spread over two, a device without float64, a fused kernel that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerator.checking import DEVICE, check

CELL = ("fixture:glm4-tiny", "--precision", "bf16", "--attn", "sdpa", "-n", "0", "--no-diagnose")
FEW = ("--max-examples", "1", "--steps", "2", "--batch-size", "2", "--seq-len", "16")


@pytest.mark.slow
@pytest.mark.parametrize(
    "device", [pytest.param(f"{DEVICE}:1", id="the second"), pytest.param(f"{DEVICE}:0,{DEVICE}:1", id="both")]
)
def test_a_cell_runs_on_any_index_and_spread_over_two(tmp_path: Path, device: str) -> None:
    """References and hooks follow each block to its device; none of the checks is skipped that runs on one."""
    there = check(tmp_path, *CELL, *FEW, "--device", device)
    assert not there.wrong(), there.said
    here = check(tmp_path, *CELL, *FEW, "--device", "cpu")
    assert there.statuses() == here.statuses()
    assert {result["device"] for result in there.results["checks"]} == {device}


@pytest.mark.slow
def test_references_run_on_the_cpu_where_the_device_has_no_float64(tmp_path: Path) -> None:
    there = check(tmp_path, *CELL, *FEW, "--device", DEVICE, NUMERICS_STANDIN_NO_FLOAT64="1")
    assert not there.wrong(), there.said
    here = check(tmp_path, *CELL, *FEW, "--device", "cpu")
    assert there.statuses() == here.statuses()


def test_a_precision_that_the_device_lacks_is_bad_input_where_it_is_named(tmp_path: Path) -> None:
    cell = ("fixture:glm4-tiny", "--precision", "fp64", "--device", DEVICE)
    refused = check(tmp_path, *cell, NUMERICS_STANDIN_NO_FLOAT64="1")
    assert refused.status == 4
    assert f"--precision fp64: {DEVICE} has no float64" in refused.said
    assert len(refused.said.splitlines()) == 1


@pytest.mark.parametrize(
    ("device", "message"),
    [
        (f"{DEVICE}:7", f"device '{DEVICE}:7' is not available here: torch sees 2 of that kind"),
        ("standing", "unknown device 'standing'; did you mean 'standin'?"),
        (f"{DEVICE}:0,cpu", "a model is spread over different accelerators of one kind"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(tmp_path: Path, device: str, message: str) -> None:
    refused = check(tmp_path, "fixture:glm4-tiny", "--device", device)
    assert refused.status == 4
    assert message in refused.said
    assert len(refused.said.splitlines()) == 1


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_fused_kernel_with_noise_fails_the_local_reference_and_is_named(tmp_path: Path, precision: str) -> None:
    cell = ("fixture:glm4-tiny", "--precision", precision, "--attn", "sdpa", "--checks", "reference.local", "-n", "0")
    sound = check(tmp_path, *cell, "--device", DEVICE, "--no-diagnose")
    assert sound.status == 0, sound.wrong()
    noisy = check(tmp_path, *cell, "--device", DEVICE, "--no-diagnose", NUMERICS_STANDIN_FUSED_NOISE="0.05")
    assert noisy.status == 1
    finding = noisy.results["checks"][0]["finding"]
    assert finding["cause"] == "kernel-accuracy"
    assert "self_attn" in finding["module"]
    assert "_scaled_dot_product_fused_attention_overrideable" in finding["op"]
