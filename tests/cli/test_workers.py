"""Workers: a cell runs in one of them, and one that dies takes only its own cell along."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from preloaded import python

DYING = """
import os, signal
import torch
from torch import nn

class Dies(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        os.kill(os.getpid(), signal.SIGKILL)

def make():
    return Dies(), {"x": torch.ones(2, 4)}

def sound():
    return nn.Linear(4, 4), {"input": torch.ones(2, 4)}
"""
CHECKS = ("--checks", "load.finite,load.dtype,forward.finite,forward.deterministic", "--no-diagnose")


def check(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    command = [python(), "-m", "numerics_suite", "check", *arguments, *CHECKS, "--json", "out.json", "--quiet"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=240)
    return done.returncode, json.loads((folder / "out.json").read_text(encoding="utf-8")), done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made_here.py").write_text(DYING, encoding="utf-8")
    return tmp_path


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error_of_its_cell_and_the_others_are_answered(folder: Path) -> None:
    subjects = ("factory:made_here:make", "factory:made_here:sound", "--name", "dies", "--name", "sound", "-n", "1")
    status, results, said = check(folder, *subjects, "--precision", "fp32")
    assert status == 3, said
    by_subject: dict[str, list[str]] = {}
    for result in results["checks"]:
        by_subject.setdefault(result["subject"], []).append(result["status"])
    assert set(by_subject["sound"]) == {"passed"}
    assert "error" in by_subject["dies"]
    assert "failed" not in by_subject["dies"]
    assert results["verdict"] == "error"


def test_all_questions_of_a_cell_run_in_one_worker(folder: Path) -> None:
    """Otherwise each worker would load the model."""
    log = folder / "loads"
    (folder / "made_here.py").write_text(
        DYING + f"\ndef noted():\n    open({str(log)!r}, 'a').write(f'{{os.getpid()}}\\n')\n    return sound()\n",
        encoding="utf-8",
    )
    arguments = ("factory:made_here:noted", "--precision", "fp32,bf16", "-n", "2")
    status, _, said = check(folder, *arguments)
    assert status == 0, said
    loads = log.read_text(encoding="utf-8").split()
    assert len(loads) <= 2 * len(set(loads)), loads
