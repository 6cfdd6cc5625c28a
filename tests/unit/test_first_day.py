"""What somebody meets on the first day: installing, warnings of a host project, a reader that is gone, workers for one cell."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from preloaded import python

from numerics_suite.cli import fixtures as command
from numerics_suite.cli.main import main
from numerics_suite.settings.options import from_command_line
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.files import read_json
from numerics_suite.suite.run import worker_count
from numerics_suite.suite.session import SuiteSession
from numerics_suite.versions import environments, installers
from numerics_suite.versions.pip_settings import read_toml

ROOT = Path(__file__).resolve().parents[2]
WARNING = """
import warnings
import torch
from torch import nn

class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, input):
        warnings.warn("this model talks")
        return self.linear(input)

def in_forward():
    return Loud(), {"input": torch.ones(2, 4)}

def while_it_is_made():
    warnings.warn("this function talks")
    return in_forward()
"""


@pytest.mark.parametrize("function", ["in_forward", "while_it_is_made"])
def test_a_hosts_warnings_as_errors_are_about_its_own_code(tmp_path, monkeypatch, function):
    (tmp_path / "talking_here.py").write_text(WARNING)
    monkeypatch.syspath_prepend(tmp_path)
    settings = from_command_line(
        {"subjects": [f"factory:talking_here:{function}"], "precision": "fp32", "checks": "forward.finite"}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        suite = SuiteSession(settings)
        (result,) = (suite.answer(question)[0] for question in suite.plan.questions)
    assert (result.status, result.reason) == ("passed", None)


def test_real_weights_need_no_package_that_compiles():
    extras = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    assert not [name for name in (*extras["real"], *extras["test"]) if "llm" in name or "llama" in name]
    assert [name.partition(">")[0] for name in extras["real"]] == ["accelerate", "gguf"]


def test_what_is_downloaded_is_said_first_and_brings_no_dependency(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(tmp_path))
    monkeypatch.setattr("numerics_suite.subjects.fixtures.refuse_without_readers", lambda: None)
    monkeypatch.setattr("numerics_suite.subjects.fixtures.weights_file", lambda _: None)
    asked: list[tuple[list[str], str]] = []
    monkeypatch.setattr(installers, "run_uv", lambda words, _: asked.append((words, capsys.readouterr().out)))
    command._fetch(SimpleNamespace(json=None, quiet=False))  # type: ignore[arg-type]
    ((words, said),) = asked
    assert "--no-deps" in words
    assert "MB" in said
    assert str(tmp_path) in said


@pytest.mark.parametrize("absent", ["accelerate", "gguf"])
def test_nothing_is_downloaded_that_could_not_be_read(absent, tmp_path, monkeypatch, capsys):
    from importlib.util import find_spec

    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == absent else find_spec(name, *rest)
    )
    monkeypatch.setattr(installers, "run_uv", lambda *_: pytest.fail("it was downloaded"))
    assert main(["fixtures", "build", "smollm2-glm"]) == 4
    assert "pip install 'numerics-suite[real]'" in capsys.readouterr().err


def test_an_environment_that_takes_long_to_make_says_that_it_goes_on(tmp_path, monkeypatch):
    said: list[str] = []

    def make(*_: object) -> dict[str, Any]:
        deadline = time.monotonic() + 30
        while len(said) < 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        return {}

    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(tmp_path))
    monkeypatch.setattr(environments, "TELL_AFTER", 0.02)
    monkeypatch.setattr(environments, "_make", make)
    monkeypatch.setattr(environments, "_mark_used", lambda _: None)
    monkeypatch.setattr(environments, "_from_marker", lambda *_, **__: None)
    environments._ensure(SimpleNamespace(name="one", title="transformers 5.0.0"), None, said.append)  # type: ignore[arg-type]
    assert said[0] == "making an environment: transformers 5.0.0"
    assert said[1].startswith("making an environment: transformers 5.0.0: still installing after ")


def test_a_cell_that_asks_nothing_wants_no_worker():
    asked = [SimpleNamespace(cell=name, skip=None, error=None) for name in ("one", "two")]
    skipped = [SimpleNamespace(cell=name, skip="no such device", error=None) for name in ("three", "four")]
    plan: Any = SimpleNamespace(device="cpu", questions=[*asked, *skipped], cells=["one", "two", "three", "four"])
    assert worker_count(Settings(workers=30), plan) == 2


@pytest.mark.parametrize("arguments", ["fixtures list", "check --help"])
def test_a_reader_that_has_seen_enough_ends_the_output_quietly(arguments, tmp_path):
    line = f"{sys.executable} -m numerics_suite {arguments} | head -c 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": "1"})  # fmt: skip
    assert done.stdout[1:].strip() == "0", done.stdout
    assert not done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_the_caller_closed_changes_no_status(closed, tmp_path):
    check = f"{python()} -m numerics_suite check"
    line = f"{check} nowhere {closed}; echo $?; {check} fixture:glm-tiny --list --json out.json {closed}; echo $?"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=tmp_path)
    said = done.stdout.splitlines()
    assert (said[0], said[-1]) == ("4", "0")
    assert "Traceback" not in done.stderr
    assert read_json(tmp_path / "out.json")
