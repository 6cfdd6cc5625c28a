"""A project that adopts the suite: what a bare `pytest` does there, and that other runs are left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from preloaded import python

SETTINGS = """
[tool.numerics-suite]
collect = true
subject = ["fixture:glm-tiny"]
precision = ["bf16"]
attn = ["sdpa"]
checks = ["load.finite", "load.dtype"]
[tool.pytest.ini_options]
python_files = ["check_*.py"]
"""


@pytest.fixture
def host(tmp_path):
    (tmp_path / "pyproject.toml").write_text(SETTINGS)
    (tmp_path / "check_own.py").write_text("def test_own():\n    assert True\n")
    return tmp_path


def run_pytest(folder, *arguments, program=""):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [program or python(), "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_bare_run_collects_the_suite_whatever_python_files_says(host):
    run = run_pytest(host, "--numerics-json", "out.json")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "3 passed" in run.stdout
    results = json.loads((host / "out.json").read_text())
    assert [check["check"] for check in results["checks"]] == ["load.dtype", "load.finite"]
    assert results["verdict"] == "pass"
    assert results["settings"]["precision"] == ["bf16"]


def test_a_named_path_leaves_the_suite_out(host):
    run = run_pytest(host, "check_own.py")
    assert run.returncode == 0
    assert "1 passed" in run.stdout
    assert "numerics-suite" not in run.stdout


def test_gpu_run_without_an_accelerator_is_not_green(host):
    run = run_pytest(host, "-m", "gpu")
    assert run.returncode == 5
    assert "no accelerator is visible" in run.stdout + run.stderr


@pytest.mark.slow
def test_gpu_run_without_an_accelerator_may_be_allowed(host):
    assert run_pytest(host, "-m", "gpu", "--numerics-allow-no-gpu").returncode == 0


def test_the_gpu_marker_of_a_project_without_the_suite_is_its_own(tmp_path):
    (tmp_path / "test_own.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_own():\n    pass\n")
    run = run_pytest(tmp_path, "-m", "gpu")
    assert run.returncode == 0
    assert "1 passed" in run.stdout


def test_bad_input_is_a_usage_error_before_anything_is_collected(host):
    run = run_pytest(host, "--numerics-subject", "fixture:glm-tinny")
    assert run.returncode == 4
    assert "did you mean 'glm-tiny'" in run.stdout + run.stderr
    assert "Traceback" not in run.stdout + run.stderr


def test_the_suite_by_its_package_name_with_a_finding_fails_with_its_block(tmp_path):
    (tmp_path / "defect.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n"
        "    layer = nn.Linear(4, 2)\n"
        "    layer.weight = nn.Parameter(torch.empty(2, 4))\n"
        "    return layer, {'input': torch.ones(3, 4)}\n"
    )
    run = run_pytest(
        tmp_path,
        "--pyargs",
        "numerics_suite.suite",
        "--numerics-subject",
        "factory:defect:make",
        "--numerics-precision",
        "fp32",
        "--numerics-checks",
        "load.head-init",
    )
    assert run.returncode == 1, run.stdout
    assert "  where     weight" in run.stdout
    assert "uninitialised-parameters" in run.stdout


def test_a_host_that_makes_warnings_errors_gets_answers(host):
    (host / "warns.py").write_text(
        "import warnings\nimport torch\n"
        "class Warns(torch.nn.Linear):\n    def forward(self, input):\n        warnings.warn('old', DeprecationWarning)\n"
        "        return super().forward(input)\n"
        "def make():\n    warnings.warn('made', UserWarning)\n    return Warns(4, 4), {'input': torch.ones(2, 4)}\n"
    )
    text = SETTINGS.replace('["fixture:glm-tiny"]', '["factory:warns:make"]').replace("load.dtype", "forward.finite")
    (host / "pyproject.toml").write_text(f'{text}filterwarnings = ["error"]\n')
    # In a fork pytest warns that modules it would rewrite are there already.
    run = run_pytest(host, program=sys.executable)
    assert run.returncode == 0, run.stdout + run.stderr
