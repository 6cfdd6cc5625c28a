"""Kills at random moments: no run hangs, is green with an open question, or loses an answer that it showed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

KILLS = int(os.environ.get("NUMERICS_SUITE_KILLS", "50"))
MODEL = """
import time
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, input):
        time.sleep(0.05)
        return self.linear(input)

def make():
    return Slow(), {"input": torch.ones(2, 4)}
"""
SUBJECT = "factory:made_here:make"
CELLS = ("--precision", "fp32,bf16")
COMMANDS = {
    "check": ("check", SUBJECT, *CELLS, "--no-diagnose", "-n", "0"),
    "check with workers": ("check", SUBJECT, *CELLS, "--no-diagnose", "-n", "2"),
    "record": ("record", "fixture:glm4-tiny", *CELLS, "--attn", "sdpa", "--baseline", "kept", "--force", "-n", "0"),
    "matrix": ("matrix", SUBJECT, *CELLS, "--no-diagnose", "--python", "VERSION", "--out", "out"),
}
LONGEST = 40.0
"""Seconds within which a run is over after it was stopped."""

pytestmark = pytest.mark.slow


def begin(folder: Path, command: str) -> subprocess.Popen[str]:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    arguments = [version if word == "VERSION" else word for word in COMMANDS[command]]
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    (folder / "out.json").unlink(missing_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "numerics_suite", *arguments, "--json", "out.json"],
        cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for at in found:
        try:
            for task in Path(f"/proc/{at}/task").iterdir():
                found += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return found


def read(folder: Path) -> dict[str, Any] | None:
    """The results file, which is whole wherever it is there."""
    file = folder / "out.json"
    content: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    return content


def answered(document: dict[str, Any] | None) -> list[Any]:
    """What a document of any command holds of answers."""
    if document is None:
        return []
    (found,) = (document[name] for name in ("checks", "cells", "baselines", "tested") if name in document)
    return list(found)


def judge(status: int, document: dict[str, Any] | None) -> None:
    """The contract's words on how a run may end."""
    checks = [entry for entry in (document or {}).get("checks", []) if "status" in entry]
    if status == 0:
        assert document is not None
        assert document["complete"]
        assert not any(entry["status"] == "error" for entry in checks)
    if status == 1:
        assert document is not None
        assert document["command"] != "check" or any(entry["status"] == "failed" for entry in checks)
    if document is not None and not document["complete"]:
        assert document["verdict"] == "error"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made_here.py").write_text(MODEL, encoding="utf-8")
    return tmp_path


@pytest.fixture(params=["check", "check with workers", "record", "matrix"])
def measured(request: pytest.FixtureRequest, folder: Path) -> tuple[str, float]:
    """A command, and how long it takes when nobody stops it."""
    begun = time.monotonic()
    running = begin(folder, request.param)
    _, said = running.communicate(timeout=600)
    assert running.returncode == 0, said
    judge(0, read(folder))
    return request.param, time.monotonic() - begun


def test_a_random_process_is_killed(folder: Path, measured: tuple[str, float]) -> None:
    command, takes = measured
    draw = random.Random(command)
    for _ in range(KILLS):
        running = begin(folder, command)
        time.sleep(draw.uniform(0.1, takes))
        shown = answered(read(folder))
        victim = draw.choice(tree(running.pid))
        with contextlib.suppress(ProcessLookupError):  # it had ended by itself
            os.kill(victim, signal.SIGKILL)
        _, said = running.communicate(timeout=takes * 3 + LONGEST)
        document = read(folder)
        assert "Traceback" not in said
        judge(running.returncode, document)
        assert len(answered(document)) >= len(shown)


def test_the_parent_is_asked_to_stop(folder: Path, measured: tuple[str, float]) -> None:
    command, takes = measured
    draw = random.Random(command)
    for _ in range(KILLS):
        running = begin(folder, command)
        time.sleep(draw.uniform(0.1, takes))
        shown = answered(read(folder))
        running.terminate()
        _, said = running.communicate(timeout=LONGEST)
        document = read(folder)
        assert "Traceback" not in said
        # Python itself needs some tenths of a second before it hears a signal; at the end the answer may be there already.
        assert running.returncode in {0, 2, -signal.SIGTERM}, said
        judge(running.returncode, document)
        assert len(answered(document)) >= len(shown)
