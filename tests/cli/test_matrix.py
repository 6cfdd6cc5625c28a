"""`numerics-suite matrix` in a world of made-up releases: what it runs, keeps, says, and how it ends."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
from unit import fake_versions

import numerics_suite
from numerics_suite.cli.main import main

RELEASES = ["5.0.0", "5.1.0", "5.2.0", "5.3.0", "5.3.1"]
SUBJECTS = ("fixture:glm-tiny", "fixture:glm4-tiny")
SCHEMA = json.loads(
    (Path(numerics_suite.__file__).parent / "reports" / "schema-matrix.json").read_text(encoding="utf-8")
)
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(numerics_suite.__file__).parents[1])}


class World:
    """The world's file, and the command run in it."""

    def __init__(self, folder: Path, monkeypatch, capsys) -> None:
        self.file, self.capsys, self.asked = folder / "world.json", capsys, []
        self.tell()
        fake_versions.install(self.file, monkeypatch.setattr, RELEASES, self.asked)

    def tell(self, **entries: object) -> None:
        """Names of releases with `_` for `.`; anything else as it is."""
        told = {
            key.removeprefix("v").replace("_", ".") if key.startswith("v") else key.replace("_", " "): value
            for key, value in entries.items()
        }
        self.file.write_text(json.dumps({"releases": RELEASES, **told}), encoding="utf-8")

    def matrix(self, *arguments: str, subjects: tuple[str, ...] = ("fixture:glm4-tiny",)) -> tuple[int, str, str]:
        status = main(["matrix", *subjects, "--jobs", "2", *arguments])
        out, err = self.capsys.readouterr()
        return status, out, err

    def cells(self, *arguments: str, **options) -> tuple[int, list[dict]]:
        status, _, err = self.matrix("--json", "out.json", *arguments, **options)
        content = json.loads(Path("out.json").read_text(encoding="utf-8"))
        jsonschema.validate(content, SCHEMA)
        assert content["exit_status"] == status, err
        return status, content["cells"]


@pytest.fixture
def world(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NUMERICS_SUITE_DEBUG", raising=False)
    return World(tmp_path, monkeypatch, capsys)


def changes(cell: dict) -> list[tuple]:
    return [(one["against"], one["subject"], one["kind"], one["module"]) for one in cell["changes"]]


# --- what it says ------------------------------------------------------------------------------------------------------


def test_each_version_is_compared_with_the_one_before_it(world):
    world.tell(
        v5_1_0={"bits": "other"},
        v5_2_0={"bits": "other", "dtype": "float32"},
        v5_3_0={"bits": "other", "dtype": "float32", "moved": "model.layers.1.mlp"},
    )
    status, cells = world.cells("--transformers", "5.0.0,5.1.0,5.2.0,5.3.0")
    assert status == 0
    assert [cell["transformers"] for cell in cells] == ["5.0.0", "5.1.0", "5.2.0", "5.3.0"]
    assert [cell["status"] for cell in cells] == ["passed"] * 4
    assert [changes(cell) for cell in cells] == [
        [],
        [("5.0.0", "glm4-tiny", "rounding", None)],
        [("5.1.0", "glm4-tiny", "contract", None)],
        [("5.2.0", "glm4-tiny", "changed", "model.layers.1.mlp")],
    ]
    assert cells[1]["changes"][0]["details"] == ["bits of logits"]
    for cell in cells:
        results = json.loads(Path(cell["results"]).read_text(encoding="utf-8"))
        assert results["command"] == "check"
        assert {check["status"] for check in results["checks"]} == {"passed"}


def test_a_failing_cell_fails_the_matrix(world):
    world.tell(v5_1_0={"failed": ["load.head-init"]}, v5_2_0={"error": ["train.finite"]})
    status, cells = world.cells("--transformers", "<5.3")
    assert status == 1
    assert [(cell["status"], cell["verdict"]) for cell in cells] == [
        ("passed", "pass"),
        ("failed", "fail"),
        ("error", "error"),
    ]
    (failure,) = cells[1]["failures"]
    assert (failure["check"], failure["cause"], failure["module"]) == (
        "load.head-init",
        "uninitialised-parameters",
        "score",
    )


def test_a_cell_that_errs_gives_3_and_hides_no_other(world):
    world.tell(
        v5_1_0={"end": "exit"},
        v5_2_0={"install": "no index has transformers 5.2.0 for Python 3.11"},
        v5_3_0={"end": "kill"},
        v5_3_1={"end": "garbage"},
    )
    status, cells = world.cells("--transformers", ">=5.0")
    assert status == 3
    assert [cell["status"] for cell in cells] == ["passed", "error", "error", "error", "error"]
    assert {(cell["torch"], cell["python"]) for cell in cells[1:]} <= {(cells[1]["torch"], cells[0]["python"])}
    assert [cell["results"] is None for cell in cells] == [False, True, True, True, True]
    reasons = [cell["reason"] for cell in cells]
    assert "status 1: ImportError: libfoo.so.1" in reasons[1]
    assert "log: " in reasons[1]
    assert Path(reasons[1].partition("log: ")[2].rstrip(")")).read_text(encoding="utf-8").startswith("cell of 5.1.0")
    assert reasons[2] == "no index has transformers 5.2.0 for Python 3.11"
    assert "ended by SIGKILL, as when memory runs out" in reasons[3]
    assert "status 0" in reasons[4]
    assert all("\n" not in (reason or "") for reason in reasons)


def test_an_unsupported_subject_hides_no_other(world):
    world.tell(
        v5_0_0={"unsupported": ["glm4-tiny"]},
        v5_1_0={"unsupported": ["glm4-tiny"], "bits": "other"},
        v5_2_0={"bits": "other"},
    )
    status, cells = world.cells("--transformers", "<5.3", subjects=SUBJECTS)
    assert status == 0
    assert [cell["status"] for cell in cells] == ["passed"] * 3
    assert "5.2.0 is the first" in cells[0]["unsupported"]["glm4-tiny"]
    assert changes(cells[1]) == [("5.0.0", "glm-tiny", "rounding", None)]
    assert changes(cells[2]) == []  # glm4-tiny has no older version to be compared with: that is no change


def test_a_family_that_no_version_has_runs_nothing(world):
    world.tell(v5_0_0={"unsupported": ["glm4-tiny"]}, v5_1_0={"unsupported": ["glm4-tiny"]})
    status, cells = world.cells("--transformers", "5.0.0,5.1.0")
    assert status == 5
    assert [(cell["status"], cell["verdict"], cell["results"]) for cell in cells] == [("unsupported", None, None)] * 2


def test_a_version_without_a_baseline_is_stepped_over(world):
    world.tell(v5_1_0={"end": "exit"}, v5_2_0={"bits": "other"})
    _, cells = world.cells("--transformers", "<5.3")
    assert changes(cells[2]) == [("5.0.0", "glm4-tiny", "rounding", None)]


def test_axes_are_compared_each_by_itself(world):
    world.tell(v5_1_0={"bits": "other"})
    status, cells = world.cells("--transformers", "5.0.0,5.1.0", "--torch", "5.2.0,5.3.0")
    assert status == 0
    assert [(cell["transformers"], cell["torch"]) for cell in cells] == [
        ("5.0.0", "5.2.0"),
        ("5.1.0", "5.2.0"),
        ("5.0.0", "5.3.0"),
        ("5.1.0", "5.3.0"),
    ]
    assert [changes(cell) for cell in cells] == [
        [],
        [("5.0.0", "glm4-tiny", "rounding", None)],
        [],
        [("5.0.0", "glm4-tiny", "rounding", None)],
    ]


def test_other_packages_vary_under_one_transformers(world):
    world.tell(v5_3_0={"failed": ["train.finite"], "bits": "other"})
    status, cells = world.cells("--transformers", "5.0.0", "--with", "accelerate>=5.2.0,<5.3.1")
    assert status == 1
    assert [(cell["transformers"], cell["with"], cell["status"]) for cell in cells] == [
        ("5.0.0", {"accelerate": "5.2.0"}, "passed"),
        ("5.0.0", {"accelerate": "5.3.0"}, "failed"),
    ]
    assert changes(cells[1]) == [("accelerate 5.2.0", "glm4-tiny", "rounding", None)]


def test_several_packages_are_combined(world):
    status, out, _ = world.matrix(
        "--with", "accelerate==5.2.0", "--with", "accelerate==5.1.0", "--with", "Peft:latest:2", "--list"
    )
    assert status == 0
    assert [line.split()[3:7] for line in out.splitlines() if "accelerate" in line] == [
        ["accelerate", version, "peft", other] for version in ("5.1.0", "5.2.0") for other in ("5.3.0", "5.3.1")
    ]


def test_each_version_is_compared_with_the_users_baselines(world, tmp_path):
    from numerics_suite.baselines.store import save

    save(tmp_path / "base", [fake_versions.recorded({"dtype": "float16"}, "glm4-tiny")], force=False)
    _, cells = world.cells("--transformers", "5.0.0,5.1.0", "--baseline", "base")
    assert [changes(cell) for cell in cells] == [[("baseline", "glm4-tiny", "contract", None)]] * 2


def test_the_table_fits_and_joins_what_is_alike(world):
    world.tell(v5_0_0={"unsupported": ["glm4-tiny"]}, v5_1_0={"failed": ["load.head-init", "forward.finite"]})
    status, out, err = world.matrix("--transformers", ">=5.0", subjects=SUBJECTS)
    assert (status, err) == (1, "")
    table = out[out.index("\ntransformers ") + 1 :].splitlines()
    paths = [line for line in table if "/" in line]
    assert all(len(line) <= 80 for line in table if line not in paths)
    assert [line.split()[:1] for line in table if line.startswith("5.")] == [["5.0.0"], ["5.1.0"], ["5.2.0"]]
    (joined,) = [line for line in table if line.startswith("5.2.0 … 5.3.1")]
    assert joined.split()[3:] == ["glm-tiny", "bf16", "ok", "identical"]
    assert any("unsupported" in line for line in table)
    assert any("FAIL load.head-init, forward.finite" in line for line in table)
    assert table[-1].startswith("FAIL: ")


def test_quiet_prints_the_verdict_alone(world):
    _, out, _ = world.matrix("--transformers", "5.0.0", "--quiet")
    assert out.splitlines()[-1] == "PASS (exit 0)"
    assert "subject" not in out


def test_json_on_standard_output_is_alone_there(world):
    status, out, err = world.matrix("--transformers", "5.0.0", "--json", "-")
    assert (status, json.loads(out)["cells"][0]["status"]) == (0, "passed")
    assert "PASS" in err


def test_list_runs_nothing(world):
    world.matrix("--transformers", "5.0.0")
    world.asked.clear()
    status, out, _ = world.matrix("--transformers", "5.0.0,5.1.0", "--list", "--json", "list.json")
    assert (status, world.asked) == (0, [])
    rows = json.loads(Path("list.json").read_text(encoding="utf-8"))["planned"]
    assert [(row["transformers"], row["done"]) for row in rows] == [("5.0.0", True), ("5.1.0", False)]
    assert out.splitlines()[-1] == "2 environments, 1 done already; nothing was run"


# --- what it keeps -----------------------------------------------------------------------------------------------------


def test_a_second_run_reuses_what_is_done(world):
    world.tell(v5_1_0={"end": "exit"})
    world.matrix("--transformers", "5.0.0,5.1.0")
    world.asked.clear()
    world.tell()
    status, cells = world.cells("--transformers", "5.0.0,5.1.0")
    assert (status, world.asked) == (0, ["5.1.0"])
    assert [cell["reused"] for cell in cells] == [True, False]
    status, out, _ = world.matrix("--transformers", "5.0.0,5.1.0")
    assert "2 kept from an earlier run" in out


@pytest.mark.parametrize(
    "arguments", [["--seed", "1"], ["--precision", "fp32"], ["--checks", "load.*"], ["--jobs", "1"], ["--name", "x"]]
)
def test_another_question_is_asked_anew(world, arguments):
    world.matrix("--transformers", "5.0.0")
    world.asked.clear()
    world.matrix("--transformers", "5.0.0", *arguments)
    reused = arguments[0] == "--jobs" and (os.cpu_count() or 1) == 1
    assert world.asked == ([] if reused else ["5.0.0"])


def test_another_checkpoint_is_asked_anew(world, tmp_path):
    import shutil

    from numerics_suite.subjects.fixtures import fixture_path

    shutil.copytree(fixture_path("glm4-tiny"), tmp_path / "mine")
    world.matrix("--transformers", "5.0.0", subjects=("./mine",))
    world.asked.clear()
    world.matrix("--transformers", "5.0.0", subjects=("./mine",))
    assert world.asked == []
    config = tmp_path / "mine" / "config.json"
    config.write_text(config.read_text(encoding="utf-8") + " ", encoding="utf-8")
    world.matrix("--transformers", "5.0.0", subjects=("./mine",))
    assert world.asked == ["5.0.0"]


def test_a_version_named_twice_runs_once(world):
    status, cells = world.cells("--transformers", "5.0.0,5.0,5.0.0;<5.1")
    assert (status, [cell["transformers"] for cell in cells], world.asked) == (0, ["5.0.0"], ["5.0.0"])


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "matrix needs versions: give --transformers SPEC (or --torch, --python, --with), as in --transformers latest:3"),
        (["--transformers", "5.3.2"], "--transformers: there is no transformers 5.3.2 for this Python; the nearest is 5.3.1"),
        (["--transformers", ">=9"], "--transformers: no release of transformers is '>=9'"),
        (["--transformers", "five"], "--transformers: 'five' says no versions of transformers: give"),
        (["--transformers", "latest:0"], "--transformers: 'latest:0' says no versions of transformers: give"),
        (["--with", "accelerate"], "--with accelerate: --with takes a package and its versions: accelerate==1.2.0"),
        (["--with", "accelerate==9.9.9"], "--with: there is no accelerate 9.9.9 for this Python; the nearest is"),
        (["--with", "torch==2.8.0"], "--with torch==2.8.0: torch has an option of its own, --torch SPEC"),
        (["--python", "three"], "--python: 'three' is no version of Python; give a list such as 3.10,3.12"),
        (["--transformers", "5.0.0", "--jobs", "0"], "--jobs: must be a whole number of at least 1, not '0'"),
        (["--transformers", "5.0.0", "--jsn", "x"], "unknown option '--jsn'; did you mean '--json'?"),
        (["--transformers", "5.0.0", "--out", "world.json"], "--out: cannot write "),
        (["--transformers", "5.0.0", "--json", "no/out"], "--json: cannot write no/out: no folder "),
        (["--transformers", "5.0.0", "--baseline", "none"], "no folder of baselines at none"),
        (["--transformers", "5.0.0", "--data", "none.jsonl"], "--data: none.jsonl cannot be read: no such file"),
        (["--transformers", "5.0.0", "none"], "none: no such directory; SUBJECT is a directory"),
        (["--transformers", "5.0.0", "fixture:none"], "no fixture is named 'none'"),
        (["--transformers", "5.0.0", "fixture:glm4-tiny"], "'fixture:glm4-tiny' and 'fixture:glm4-tiny' are both named"),
        (["--transformers", "5.0.0", "--checks", "load.*", "--skip", "*"], "--checks and --skip leave no check to run"),
        (["--transformers", "5.0.0", "."], "has no config.json; name the folder that holds it"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_4(world, arguments, line):
    status, out, err = world.matrix(*arguments)
    assert (status, out, err.count("\n")) == (4, "", 1)
    assert line in err
    assert world.asked == []
    assert not Path(".numerics").exists()


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("no_network", "no network: the releases of transformers could not be asked"),
        ("no_uv", "environments per version are made by uv"),
    ],
)
def test_no_network_and_no_uv_are_one_line(world, key, line):
    world.tell(**{key: line})
    status, _, err = world.matrix("--transformers", "5.0.0,5.1.0")
    assert (status, err.count("\n")) == (4, 1)
    assert line in err


def test_without_ray_it_says_how_to_install_it(world, monkeypatch):
    monkeypatch.setattr("numerics_suite.versions.ray_backend.importlib.util.find_spec", lambda _: None)
    status, _, err = world.matrix("--transformers", "5.0.0", "--ray", "auto")
    assert status == 4
    assert err == "numerics-suite: error: --ray needs Ray, which is not installed: pip install 'numerics-suite[ray]'\n"


def test_two_runs_never_share_a_folder(world, tmp_path):
    from numerics_suite.versions.result_store import ResultStore

    with ResultStore(tmp_path / "out"):
        status, _, err = world.matrix("--transformers", "5.0.0", "--out", "out")
    assert (status, err.count("\n")) == (4, 1)
    assert "another run is writing" in err


# --- how it is stopped -------------------------------------------------------------------------------------------------


def begin(folder: Path, command: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, fake_versions.__file__, str(folder / "world.json"), command, "fixture:glm4-tiny", *arguments],
        cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def whole(folder: Path) -> set[str]:
    """Names of the finished answers; everything that has a name must be whole."""
    found = set()
    for place in folder.iterdir() if folder.is_dir() else ():
        if place.name.startswith("."):
            continue
        done = json.loads((place / "done.json").read_text(encoding="utf-8"))
        if done["results"]:
            json.loads((place / "results.json").read_text(encoding="utf-8"))
        if done["baseline"]:
            from numerics_suite.baselines.store import load

            load(place / "baseline")
        if done["status"] != "error":
            found.add(place.name)
    return found


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that still work for that folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in line and "cell" in line:
            found.append(line)
    return found


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_keeps_what_is_done_and_ends_every_process(tmp_path, number):
    slow = {release: {"seconds": 60} for release in RELEASES[1:]}
    (tmp_path / "world.json").write_text(json.dumps({"releases": RELEASES, **slow}), encoding="utf-8")
    running = begin(tmp_path, "matrix", "--transformers", ">=5.0", "--jobs", "2")
    out = tmp_path / ".numerics" / "matrix"
    deadline = time.monotonic() + 30
    while not whole(out) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(number)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 2, err
    assert err.splitlines()[-1] == "numerics-suite: interrupted"
    assert "1 finished kept in" in err
    assert len(whole(out)) == 1
    assert not (out / ".unfinished").exists()
    assert processes_of(tmp_path) == []


def kill_at_random(folder: Path, command: str, arguments: list[str], kills: int, longest: float) -> None:
    """Kill a command at random moments, over and over; nothing that was finished is lost, nothing is ever half there."""
    draw = random.Random(0)
    out, kept = folder / "out", set()
    for _ in range(kills):
        running = begin(folder, command, *arguments, "--out", "out", "--json", "answer.json")
        time.sleep(draw.uniform(0.02, longest))
        running.kill()
        running.communicate(timeout=30)
        now = whole(out)
        assert kept <= now
        kept = now
        answer = folder / "answer.json"
        if answer.exists() and json.loads(answer.read_text(encoding="utf-8"))["complete"]:
            (folder / "answer.json").unlink()
            # All was done: begin again from nothing, so that every moment of a run is met.
            import shutil

            shutil.rmtree(out)
            kept = set()
    deadline = time.monotonic() + 10
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(folder) == []
    last = begin(folder, command, *arguments, "--out", "out", "--json", "answer.json")
    _, err = last.communicate(timeout=120)
    assert last.returncode == 0, err


@pytest.mark.slow
def test_fifty_kills_lose_no_result(tmp_path):
    (tmp_path / "world.json").write_text(json.dumps({"releases": RELEASES}), encoding="utf-8")
    kill_at_random(tmp_path, "matrix", ["--transformers", ">=5.0", "--jobs", "2"], 50, 3.0)
