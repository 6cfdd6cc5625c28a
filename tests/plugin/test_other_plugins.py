"""The suite and the fixture `numerics_subject` beside other plugins of pytest, and with warnings as errors."""

from __future__ import annotations

import importlib.util
import json
from xml.etree import ElementTree as ET

import pytest
from plugin.test_host_project import run_pytest

SETTINGS = """
[tool.numerics-suite]
collect = true
subjects = ["factory:defect:whole", "factory:defect:broken"]
names = ["whole", "broken"]
precision = ["fp32"]
checks = ["load.finite", "forward.finite"]
diagnose = false
"""
DEFECT = """
import warnings
import torch
from torch import nn

class Small(nn.Module):
    def __init__(self, factor):
        super().__init__()
        warnings.warn("made", UserWarning)
        self.head, self.factor = nn.Linear(4, 2), factor

    def forward(self, input):
        return self.head(input) * self.factor

def whole():
    with open("loads.txt", "a") as file:
        file.write("whole\\n")
    return Small(1.0), {"input": torch.ones(3, 4)}

def broken():
    return Small(float("nan")), {"input": torch.ones(3, 4)}
"""
OWN = """
import numerics_suite
import pytest

def test_parameters(numerics_subject):
    numerics_suite.assert_finite(numerics_subject.model)

def test_outputs(numerics_subject):
    out = numerics_subject.model(**numerics_subject.batch)
    if numerics_subject.name == "broken":
        with pytest.raises(AssertionError, match="6 of 6 elements"):
            numerics_suite.assert_finite(out)
    else:
        numerics_suite.assert_finite(out)
        numerics_suite.assert_matches_reference(numerics_subject.model, numerics_subject.batch)
"""


@pytest.fixture
def host(tmp_path):
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    (tmp_path / "defect.py").write_text(DEFECT)
    (tmp_path / "test_own.py").write_text(OWN)
    return tmp_path


def needs(module: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not installed")


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["-W", "error"], id="warnings as errors"),
        pytest.param(["-n", "2", "--dist", "loadgroup"], id="xdist", marks=pytest.mark.slow),
        pytest.param(["-p", "no:xdist"], id="randomly", marks=needs("pytest_randomly")),
        pytest.param(["--timeout", "300"], id="timeout", marks=needs("pytest_timeout")),
        pytest.param(["--reruns", "2"], id="rerunfailures", marks=needs("pytest_rerunfailures")),
    ],
)
def test_it_works_beside(host, arguments):
    run = run_pytest(host, "--numerics-json", "out.json", "--junitxml", "junit.xml", *arguments)
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed, 7 passed" in run.stdout
    assert "rerun" not in run.stdout.splitlines()[-1]
    results = json.loads((host / "out.json").read_text())
    statuses = {check["id"]: check["status"] for check in results["checks"]}
    assert [name for name, status in statuses.items() if status != "passed"] == [
        "forward.finite/broken/fp32/default/cpu"
    ]
    cases = [case for case in ET.parse(host / "junit.xml").iter("testcase") if "own" not in case.get("classname")]
    assert len({case.get("name") for case in cases}) == len(cases) == len(statuses), "a case per check"


def test_without_the_plugin_other_tests_run_as_ever(host):
    (host / "test_other.py").write_text("def test_other():\n    pass\n")
    run = run_pytest(host, "-p", "no:numerics_suite", "-W", "error", "test_other.py")
    assert run.returncode == 0, run.stdout
    assert run.stdout.splitlines()[-1].startswith("1 passed in")


@pytest.mark.slow
def test_what_would_run_is_readable(host):
    run = run_pytest(host, "--co")
    assert run.returncode == 0
    assert "test_forward.py::test_forward[finite-broken-fp32-default-cpu]" in run.stdout
    assert "test_own.py::test_outputs[whole-fp32-default-cpu]" in run.stdout


@pytest.mark.slow
def test_listings_judge_nothing(host):
    assert "@pytest.mark.gpu: runs on an accelerator" in run_pytest(host, "--markers").stdout
    run = run_pytest(host, "--fixtures")
    assert "numerics_subject [session scope]" in run.stdout
    assert "ERROR" not in run.stdout
    assert run.returncode == 0


def test_each_subject_is_loaded_once_for_a_users_own_tests(host):
    run = run_pytest(host, "test_own.py", "-W", "error")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "4 passed" in run.stdout
    # Once to describe the subject, once to load it; a third would be a load for the second test.
    assert (host / "loads.txt").read_text().count("whole") <= 2


def test_without_a_subject_the_test_is_skipped_with_the_reason(host):
    (host / "pyproject.toml").unlink()
    run = run_pytest(host, "test_own.py", "-rs")
    assert run.returncode == 0
    assert "2 skipped" in run.stdout
    assert "set subjects in [tool.numerics-suite] or pass --numerics-subject" in run.stdout


@pytest.mark.slow
def test_a_subject_that_is_not_there_is_one_message_and_no_traceback(host):
    run = run_pytest(host, "test_own.py", "--numerics-subject", "./absent", "--numerics-name", "absent")
    assert run.returncode == 2
    assert "./absent" in run.stdout
    assert "Traceback" not in run.stdout
    assert "planning.py" not in run.stdout
