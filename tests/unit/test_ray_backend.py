"""Cells on a Ray cluster: what a node is given, and a matrix on a local Ray."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from numerics_suite.subjects.fixtures import fixture_names
from numerics_suite.versions.jobs import RunningEnvironment
from numerics_suite.versions.ray_backend import stage


def test_a_node_gets_a_copy_that_knows_what_it_needs(tmp_path):
    stage(tmp_path)
    script = (
        "import json, numerics_suite\nfrom numerics_suite.subjects.fixtures import fixture_names, fixture_path, trusted_fixture\n"
        "from numerics_suite.versions.recipes import own_requirements\n"
        "print(json.dumps([numerics_suite.__file__, [str(fixture_path(name)) for name in fixture_names()], "
        "sorted(one.name for one in own_requirements()), trusted_fixture(fixture_path('chatglm-tiny'))]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{script}"],
        capture_output=True,
        text=True,
        check=True,
    )
    where, fixtures, needs, trusted = json.loads(done.stdout)
    assert Path(where).parents[1] == tmp_path
    assert [Path(path).parents[2] for path in fixtures] == [tmp_path] * len(fixture_names())
    assert {"torch", "transformers", "hypothesis", "packaging"} <= set(needs)
    assert trusted


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_a_matrix_on_a_local_ray(tmp_path):
    """The running versions and one other, each made by its task; what fails on a node is that cell's error."""
    command = [
        *RunningEnvironment().command(
            "numerics_suite", "matrix", "fixture:glm4-tiny", "--precision", "bf16", "--attn", "sdpa"
        ),
        *("--transformers", "5.7.0,5.9.0", "--checks", "load.*", "--ray", "local", "--json", "out.json", "--jobs", "2"),
    ]

    def run():
        return subprocess.run(
            command,
            cwd=tmp_path,
            env=RunningEnvironment().variables(),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    cells = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["cells"]
    assert [(cell["transformers"], cell["status"]) for cell in cells] == [("5.7.0", "passed"), ("5.9.0", "passed")]
    assert all(Path(cell["results"]).is_file() and Path(cell["baseline"]).is_dir() for cell in cells)
    assert "2 kept from an earlier run" in run().stdout
