"""The stand-in accelerator of tests/standin keeps its promises, and stays out of processes that do not ask for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
STANDIN = ROOT / "tests/standin"
SUPPORTED = sys.platform == "linux" and hasattr(getattr(torch._C, "_acc", None), "register_python_privateuseone_hook")


@pytest.mark.skipif(not SUPPORTED, reason="PyTorch's Python backends came with 2.9; the stand-in knows Linux only")
@pytest.mark.parametrize("part", [pytest.param("models", marks=pytest.mark.slow), "the rest"])
def test_selftest(part: str) -> None:
    files = sorted((STANDIN / "selftest").glob("*.py"))
    chosen = [file for file in files if (file.stem == "models") == (part == "models")]
    assert chosen
    # The device registers itself for good when torch is imported, so that its tests need a process of their own.
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            "--rootdir",
            STANDIN,
            *chosen,
        ],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(map(str, (STANDIN, ROOT))), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_other_processes_do_without_it() -> None:
    if str(STANDIN) in os.environ.get("PYTHONPATH", ""):
        pytest.skip("this process asked for the stand-in")
    assert not hasattr(torch, "standin")
