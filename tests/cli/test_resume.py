"""A run that is killed, and the run that goes on where it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

MODEL = """
import time
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, input):
        open("calls", "a").write("x")
        time.sleep(0.3)
        return self.linear(input)

def make():
    return Slow(), {"input": torch.ones(2, 4)}
"""
pytestmark = pytest.mark.slow


def begin(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    given = ("check", "factory:made_here:make", "--precision", "fp32,bf16,fp16", "--no-diagnose", "--json", "out.json")
    return subprocess.Popen(
        [sys.executable, "-m", "numerics_suite", *given, *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    return content


def answers(document: dict[str, Any]) -> dict[str, Any]:
    return {entry["id"]: (entry["status"], entry["reason"], entry["measurements"]) for entry in document["checks"]}


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_killed_run_goes_on_where_it_ended(tmp_path: Path, workers: str) -> None:
    (tmp_path / "made_here.py").write_text(MODEL, encoding="utf-8")
    whole = begin(tmp_path, "-n", workers)
    _, said = whole.communicate(timeout=300)
    assert whole.returncode == 0, said
    expected, calls = answers(read(tmp_path)), len((tmp_path / "calls").read_text())
    (tmp_path / "out.json").unlink()
    (tmp_path / "calls").unlink()

    killed = begin(tmp_path, "-n", workers)
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        time.sleep(0.1)
        file = tmp_path / "out.json"
        if file.exists() and sum(e["status"] == "passed" for e in read(tmp_path)["checks"]) >= 8:
            break
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate(timeout=60)
    left = read(tmp_path)
    assert not left["complete"]
    assert 8 <= len(left["checks"]) < len(expected)

    (tmp_path / "calls").unlink()
    again = begin(tmp_path, "-n", workers, "--resume", "out.json")
    # Killed once more before it has a plan of its own, the file still holds what it held.
    time.sleep(1.0)
    assert len(read(tmp_path)["checks"]) >= len(left["checks"])
    out, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert answers(read(tmp_path)) == expected
    assert f"{len(left['checks'])} of {len(expected)} answers are those of out.json" in out
    assert len((tmp_path / "calls").read_text()) < calls
