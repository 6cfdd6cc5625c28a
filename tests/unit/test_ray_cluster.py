"""A matrix on a real Ray cluster of several local nodes: cells go where memory is, and outlive the node that they run on.

Cluster, nodes, scheduling and retries are Ray's own; the cells are those of `fake_versions`, whose length and end a test decides.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preloaded import python
from unit import fake_versions

from numerics_suite.settings.tree import Settings
from numerics_suite.versions import memory_demand as demand
from numerics_suite.versions.jobs import RunningEnvironment, rough_bytes

needs_ray = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
]
SMALL, LARGE = 200_000_000, 4_000_000_000
"""Bytes of memory of a node; a cell of the tiny fixture needs 0.6 GB and more."""


class LocalCluster:
    """The program `ray_nodes.py` and what it says of its nodes."""

    def __init__(self, folder: Path) -> None:
        self.log = (folder / "cluster.log").open("w", encoding="utf-8")
        variables = {**RunningEnvironment().variables(), "RAY_USAGE_STATS_ENABLED": "0"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ray_nodes.py")), str(SMALL), str(LARGE), str(LARGE)],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
        )
        told = json.loads(self.process.stdout.readline())
        self.address, (self.small, *self.large) = told["address"], told["raylets"]

    def lose(self, raylet: int) -> None:
        """End a node as when its machine goes: the raylet and all that it began, by SIGKILL."""
        assert raylet in self.large
        self.process.stdin.write(f"{raylet}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "lost\n"

    def end(self) -> None:
        self.process.communicate(timeout=120)
        self.log.close()


@pytest.fixture
def cluster(tmp_path_factory):
    made = LocalCluster(tmp_path_factory.mktemp("cluster"))
    yield made
    made.end()


class Matrix:
    """A matrix over made-up releases, running."""

    def __init__(self, folder: Path, address: str, releases: dict) -> None:
        self.folder, self.log = folder, folder / "began.txt"
        world = {name: {"began": str(self.log), **what} for name, what in releases.items()}
        (folder / "world.json").write_text(json.dumps({**world, "releases": list(releases)}), encoding="utf-8")
        options = [
            "--transformers",
            ",".join(releases),
            "--precision",
            "bf16",
            "--attn",
            "sdpa",
            "--json",
            "out.json",
            "--ray",
            address,
        ]
        program = [sys.executable, fake_versions.__file__, str(folder / "world.json")]
        self.process = subprocess.Popen(
            [*program, "matrix", "fixture:glm4-tiny", *options],
            cwd=folder,
            env=RunningEnvironment().variables(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def began(self) -> list[tuple[str, int]]:
        """Release and raylet of each cell that began, in that order."""
        lines = self.log.read_text(encoding="utf-8").split("\n") if self.log.exists() else []
        return [(name, int(raylet)) for name, raylet in (line.split() for line in lines if line)]

    def wait_for(self, *releases: str, count: int = 1) -> list[tuple[str, int]]:
        """Those of some releases, once so many of them began."""
        deadline = time.monotonic() + 300
        while len(found := [one for one in self.began() if one[0] in releases]) < count:
            assert self.process.poll() is None, self.process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        return found

    def end(self) -> tuple[int, dict, str]:
        said = self.process.communicate(timeout=400)[0]
        answer = json.loads((self.folder / "out.json").read_text(encoding="utf-8"))
        return self.process.returncode, {cell["transformers"]: cell for cell in answer["cells"]}, said


def test_the_demand_is_the_plans_largest_cell(capsys):
    from numerics_suite.suite.run import planned

    settings = Settings(subjects=("fixture:glm4-tiny",), precision=("bf16", "fp64"), attn=("sdpa",), device="cpu")
    rows, _ = planned(settings)
    assert len({row.bytes for row in rows}) == 2
    assert demand.planned_bytes(settings) == demand.PROCESS_BYTES + max(row.bytes for row in rows)


@pytest.fixture
def _fork(monkeypatch):
    """The other process is a fork of one that has torch loaded."""
    monkeypatch.setattr(sys, "executable", python())


@pytest.mark.usefixtures("_fork")
def test_the_demand_is_made_in_another_process(tmp_path):
    settings = Settings(subjects=("fixture:glm4-tiny",), precision=("bf16",), attn=("sdpa",), device="cpu")
    size = demand.memory_demand(settings, 10**9, tmp_path)
    assert size == demand.planned_bytes(settings)
    assert size != rough_bytes(10**9)


@pytest.mark.usefixtures("_fork")
def test_without_a_plan_the_files_size_decides(tmp_path):
    lacking = Settings(subjects=(str(tmp_path / "none"),), precision=("bf16",), attn=("sdpa",), device="cpu")
    assert demand.memory_demand(lacking, 10**9, tmp_path) == rough_bytes(10**9)


class TestCluster:
    pytestmark = needs_ray

    def test_a_lost_node_and_one_too_small(self, cluster, tmp_path):
        """Four cells; the node of one that runs is killed. Each cell is answered, none by the node that is too small."""
        matrix = Matrix(
            tmp_path,
            cluster.address,
            {
                "5.7.0": {"seconds_of_the_first_run": 20},
                "5.8.0": {"seconds_of_the_first_run": 300, "failed": ["train.finite"]},
                "5.9.0": {"end": "kill"},
                "5.10.0": {},
            },
        )
        ((_, raylet),) = matrix.wait_for("5.8.0")
        cluster.lose(raylet)
        status, cells, said = matrix.end()
        assert {name: cell["status"] for name, cell in cells.items()} == {
            "5.7.0": "passed",
            "5.8.0": "failed",
            "5.9.0": "error",
            "5.10.0": "passed",
        }, said
        assert "SIGKILL" in cells["5.9.0"]["reason"]
        assert status == 1
        runs = [one for name, one in matrix.began() if name == "5.8.0"]
        assert len(runs) == 2
        assert runs[0] != runs[1]
        assert cluster.small not in {one for _, one in matrix.began()}

    def test_no_node_left_that_is_large_enough(self, cluster, tmp_path):
        """Both large nodes are killed: the cells that cannot run anywhere any more say so, and the run ends."""
        matrix = Matrix(tmp_path, cluster.address, {"5.8.0": {"seconds": 300}, "5.9.0": {"seconds": 300}})
        matrix.wait_for("5.8.0", "5.9.0", count=2)
        for raylet in cluster.large:
            cluster.lose(raylet)
        status, cells, said = matrix.end()
        assert status == 3, said
        for name in ("5.8.0", "5.9.0"):
            assert cells[name]["status"] == "error"
            assert cells[name]["reason"].startswith("no node can hold it: it needs 1 CPU and ")
            assert "2 CPUs and 0.2 GB" in cells[name]["reason"]
