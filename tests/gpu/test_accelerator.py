"""What only an accelerator shows; `pytest -m gpu` runs these and the suite's own cells there."""

from __future__ import annotations

import json

import pytest
import torch

from numerics_suite.cli.main import main
from numerics_suite.devices.device import accelerator, default_precisions, lacks
from numerics_suite.devices.precisions import PRECISIONS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(accelerator() is None, reason="no accelerator is visible to torch")]


@pytest.fixture(scope="module")
def device():
    return accelerator()


def checked(tmp_path, *arguments):
    out = tmp_path / "out.json"
    status = main(["check", *arguments, "--json", str(out), "--quiet", "-n", "0"])
    return status, json.loads(out.read_text())


def answers(results):
    """Status by what a question is on any device, and the reason of what did not pass."""
    return {
        (check["check"], check["subject"], check["precision"], check["attn"]): (check["status"], check["reason"])
        for check in results["checks"]
    }


def test_the_fixtures_are_clean_in_every_default_precision(tmp_path, device):
    status, results = checked(tmp_path, "--require-device", device)
    assert status == 0, [check["id"] for check in results["checks"] if check["status"] in {"failed", "error"}]
    assert {check["precision"] for check in results["checks"]} == set(default_precisions(device))
    assert all(check["device"].startswith(device) for check in results["checks"])


def test_nothing_is_skipped_here_that_runs_on_the_cpu(tmp_path, device):
    """The same cells on both: every check that passes on the CPU passes here."""
    names = ",".join(name for name in default_precisions(device) if not lacks(PRECISIONS[name], "cpu"))
    cells = ("fixture:glm4-tiny", "fixture:glm4-tiny-classifier", "--precision", names)
    _, here = checked(tmp_path, *cells, "--device", device)
    _, there = checked(tmp_path, *cells, "--device", "cpu")
    found = answers(here)
    differing = {key: (found[key], answer) for key, answer in answers(there).items() if found[key][0] != answer[0]}
    assert not differing


def test_tf32_is_far_outside_what_float32_makes_unavoidable(tmp_path, device):
    reason = lacks(PRECISIONS["tf32"], device)
    if reason:
        pytest.skip(reason)
    ratios = {}
    for name in ("fp32", "tf32"):
        arguments = ("fixture:glm4-tiny", "--precision", name, "--attn", "eager", "--checks", "reference.end-to-end")
        _, results = checked(tmp_path, *arguments)
        ratios[name] = results["checks"][0]["measurements"]["kernel-ratio"]
    assert ratios["tf32"] > 100 * ratios["fp32"]


def test_tf32_that_the_user_has_switched_on_leaves_fp32_alone(tmp_path, device):
    if lacks(PRECISIONS["tf32"], device):
        pytest.skip(lacks(PRECISIONS["tf32"], device))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        status, _ = checked(tmp_path, "fixture:glm4-tiny", "--precision", "fp32", "--checks", "reference.*")
    finally:
        torch.set_float32_matmul_precision(before)
    assert status == 0


def test_the_cpu_can_be_asked_for_beside_an_accelerator(tmp_path):
    status, results = checked(tmp_path, "fixture:glm-tiny", "--device", "cpu", "--precision", "fp32", "--attn", "sdpa")
    assert status == 0
    assert {check["device"] for check in results["checks"]} == {"cpu"}
    assert torch.accelerator.is_available()
