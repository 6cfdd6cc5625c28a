"""Every check runs on a device that is not the CPU, and none is skipped there that runs on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerator.checking import DEVICE, check

QUICK = ("--max-examples", "2", "--steps", "2", "-n", "0", "--no-diagnose")
GRID = tuple(f"fixture:{family}-tiny{head}" for family in ("glm", "glm4", "chatglm") for head in ("", "-classifier"))


@pytest.mark.parametrize(
    ("subject", "precision"),
    [
        ("glm4-tiny", "bf16"),
        ("glm4-tiny-classifier", "amp-bf16"),
        pytest.param("glm4-tiny", "amp-bf16", marks=pytest.mark.slow),
        pytest.param("glm4-tiny-classifier", "bf16", marks=pytest.mark.slow),
    ],
)
def test_every_check_runs_on_the_stand_in(tmp_path: Path, subject: str, precision: str) -> None:
    """A causal model and a classifier, in bfloat16 and under autocast, with the fused attention; two of them meet every check."""
    cells = (f"fixture:{subject}", "--precision", precision, "--attn", "sdpa", *QUICK)
    there = check(tmp_path, *cells, "--device", DEVICE)
    assert not there.wrong(), there.said
    here = check(tmp_path, *cells, "--device", "cpu")
    assert there.status == here.status == 0
    assert there.statuses() == here.statuses()
    assert {result["device"] for result in there.results["checks"]} == {DEVICE}


@pytest.mark.slow
@pytest.mark.parametrize("subject", GRID)
def test_the_whole_grid_gives_the_cpus_answers(tmp_path: Path, subject: str) -> None:
    cells = (subject, "--precision", "fp32,bf16,fp16,amp-bf16,amp-fp16", "--attn", "eager,sdpa", *QUICK)
    there = check(tmp_path, *cells, "--device", DEVICE)
    assert not there.wrong(), there.said
    here = check(tmp_path, *cells, "--device", "cpu")
    assert there.statuses() == here.statuses()


@pytest.mark.slow
def test_a_stand_in_is_no_accelerator_of_this_machine(tmp_path: Path) -> None:
    cells = ("fixture:glm4-tiny", "--precision", "fp32", "--attn", "eager", "--checks", "load.finite")
    assert {found["device"] for found in check(tmp_path, *cells).results["checks"]} == {"cpu"}
    refused = check(tmp_path, *cells, "--device", DEVICE, "--require-device", DEVICE)
    assert refused.status == 4
    assert f"--require-device {DEVICE}" in refused.said
