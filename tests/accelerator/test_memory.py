"""`--list` states a cell's memory within 20 %, and running out of it is an error that states bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from accelerator.checking import DEVICE, check, environment

PEAK = """
import sys
import torch
from numerics_suite.cli.main import main

status = main(["check", *sys.argv[1:], "-n", "0", "--quiet", "--no-diagnose"])
print(status, torch.standin.max_memory_allocated(0))
"""


def stated_and_peak(folder: Path, *cells: str) -> tuple[int, int]:
    """Bytes that `--list` says of the one cell, and the most that were alive at once while it ran."""
    command = [sys.executable, "-m", "numerics_suite", "check", *cells, "--device", DEVICE, "--list", "--json", "-"]
    run = {"cwd": folder, "env": environment(), "capture_output": True, "text": True}
    (row,) = json.loads(subprocess.run(command, check=True, **run).stdout)["planned"]
    said = subprocess.run([sys.executable, "-c", PEAK, *cells, "--device", DEVICE], check=True, **run).stdout.split()
    assert said[-2] == "0"
    return row["bytes"], int(said[-1])


@pytest.mark.parametrize(
    ("subject", "precision"),
    [
        pytest.param("glm4-tiny", "bf16", marks=pytest.mark.slow),
        pytest.param("glm4-tiny", "fp32", marks=pytest.mark.slow),
        pytest.param("glm-tiny", "amp-bf16", marks=pytest.mark.slow),
        pytest.param("glm4-tiny", "fp16", marks=pytest.mark.slow),
        pytest.param("glm4-tiny-classifier", "fp32", marks=pytest.mark.slow),
        pytest.param("chatglm-tiny", "bf16", marks=pytest.mark.slow),
    ],
)
def test_the_stated_memory_is_that_of_the_cell(tmp_path: Path, subject: str, precision: str) -> None:
    cells = (f"fixture:{subject}", "--precision", precision, "--attn", "sdpa", "--max-examples", "4", "--steps", "2")
    stated, peak = stated_and_peak(tmp_path, *cells)
    assert 0.8 * peak <= stated <= 1.2 * peak


ONE_CELL = (
    "fixture:glm4-tiny",
    "--precision",
    "fp32",
    "--attn",
    "sdpa",
    "--device",
    DEVICE,
    "--no-diagnose",
    "-n",
    "0",
)


@pytest.mark.parametrize("bytes_", [pytest.param(2_000_000, marks=pytest.mark.slow), 6_000_000])
@pytest.mark.slow
def test_running_out_of_memory_is_an_error_and_never_a_skip_or_a_pass(tmp_path: Path, bytes_: int) -> None:
    """With room for the model and not for a copy in float64, and with room for that and not for gradients."""
    ended = check(tmp_path, *ONE_CELL, "--max-examples", "1", "--steps", "1", NUMERICS_STANDIN_MEMORY=str(bytes_))
    assert ended.status == 3
    reasons = [result["reason"] for result in ended.results["checks"] if result["status"] == "error"]
    assert reasons
    assert all(reason.startswith(f"out of memory on {DEVICE}: ") for reason in reasons)
    assert all("bytes asked" in reason and "bytes free" in reason for reason in reasons)
    here = check(
        tmp_path, *(cell if cell != DEVICE else "cpu" for cell in ONE_CELL), "--max-examples", "1", "--steps", "1"
    )
    skipped = {key for key, status in here.statuses().items() if status == "skipped"}
    assert {key for key, status in ended.statuses().items() if status == "skipped"} <= skipped


def test_a_model_that_does_not_fit_is_an_error_of_its_cell(tmp_path: Path) -> None:
    ended = check(tmp_path, *ONE_CELL, "--checks", "forward.finite,load.finite", NUMERICS_STANDIN_MEMORY="100000")
    assert ended.status == 3
    assert set(ended.statuses().values()) == {"error"}
    assert ended.said == "" or "Traceback" not in ended.said


@pytest.mark.slow
def test_a_device_that_fails_for_good_ends_its_worker_and_the_remaining_cells_run_in_a_new_one(tmp_path: Path) -> None:
    cells = (
        *("fixture:glm4-tiny", "--precision", "fp32,bf16", "--attn", "eager", "--device", DEVICE),
        *("--checks", "load.finite,forward.finite", "--max-examples", "1", "--no-diagnose"),
    )
    ended = check(tmp_path, *cells, NUMERICS_STANDIN_LOST_AFTER="60")
    lost = [result for result in ended.results["checks"] if result["status"] == "error"]
    assert ended.status == 3
    assert "device-side assert" in lost[0]["reason"]
    assert {result["precision"] for result in lost} == {"fp32", "bf16"}  # each worker's device fails alike
    assert len(ended.results["checks"]) == 4
