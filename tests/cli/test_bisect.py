"""`numerics-suite bisect` in a world of made-up releases, commits and revisions: what it finds, asks and refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
from cli.test_matrix import ENVIRONMENT, begin, kill_at_random, processes_of, whole
from unit import fake_versions

import numerics_suite
from numerics_suite.cli.main import main
from numerics_suite.subjects.fixtures import fixture_path
from numerics_suite.versions.revisions import brought, of_checkpoint

RELEASES = [f"5.{minor}.0" for minor in range(12)]
SCHEMA = json.loads(
    (Path(numerics_suite.__file__).parent / "reports" / "schema-bisect.json").read_text(encoding="utf-8")
)


class World:
    """The world's file, and the command run in it."""

    def __init__(self, folder: Path, monkeypatch, capsys) -> None:
        self.file, self.capsys, self.asked = folder / "world.json", capsys, []
        self.tell({})
        fake_versions.install(self.file, monkeypatch.setattr, RELEASES, self.asked)

    def tell(self, entries: dict) -> None:
        self.file.write_text(json.dumps({"releases": RELEASES, **entries}), encoding="utf-8")

    def from_on(self, first: int, **entry: object) -> dict:
        return {release: dict(entry) for release in RELEASES[first:]}

    def bisect(self, *arguments: str, subject: str = "fixture:glm4-tiny") -> tuple[int, str, str]:
        status = main(["bisect", subject, "--jobs", "2", *arguments])
        out, err = self.capsys.readouterr()
        return status, out, err

    def found(self, *arguments: str, **options) -> dict:
        status, out, err = self.bisect("--json", "out.json", *arguments, **options)
        assert (status, err) == (0, ""), (out, err)
        content = json.loads(Path("out.json").read_text(encoding="utf-8"))
        jsonschema.validate(content, SCHEMA)
        return content


@pytest.fixture
def world(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NUMERICS_SUITE_DEBUG", raising=False)
    return World(tmp_path, monkeypatch, capsys)


ENDS = ("--good", RELEASES[0], "--bad", RELEASES[-1])


# --- what it finds -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 6, 11])
def test_the_first_bad_release_is_named(world, first):
    world.tell(world.from_on(first, failed=["forward.finite", "load.head-init"]))
    found = world.found(*ENDS)
    assert (found["last_good"], found["first_bad"], found["between"]) == (RELEASES[first - 1], RELEASES[first], [])
    assert (found["check"], found["kind"]) == ("load.head-init", "failed")
    assert (found["finding"]["cause"], found["finding"]["module"]) == ("uninitialised-parameters", "score")
    assert found["finding"]["title"] == f"load.head-init fails in {RELEASES[first]}"
    assert [step["verdict"] for step in found["tested"][:2]] == ["bad", "good"]
    assert len(found["tested"]) <= 6
    assert len(world.asked) == len(set(world.asked)) == len(found["tested"])
    assert json.loads(Path(found["results"]).read_text(encoding="utf-8"))["verdict"] == "fail"


def test_between_the_ends_the_deciding_checks_alone_are_asked(world):
    world.tell(world.from_on(5, failed=["forward.finite"]))
    world.found(*ENDS)
    asked = {}
    for job in Path(".numerics/bisect").glob("*/job.json"):
        content = json.loads(job.read_text(encoding="utf-8"))
        asked[content["versions"]["transformers"]] = content["settings"]["checks"]
    assert asked.pop(RELEASES[0]) == asked.pop(RELEASES[-1]) == []
    assert asked
    assert all(checks == ["forward.finite"] for checks in asked.values())


def test_a_check_that_fails_at_both_ends_decides_nothing(world):
    world.tell(world.from_on(0, failed=["train.finite"]) | world.from_on(4, failed=["train.finite", "forward.finite"]))
    found = world.found(*ENDS)
    assert (found["first_bad"], found["check"]) == (RELEASES[4], "forward.finite")
    assert found["deciding"] == ["forward.finite/glm4-tiny/bf16/sdpa/cpu"]


def test_releases_that_cannot_run_are_skipped_and_shown(world):
    broken = {
        RELEASES[5]: {"install": "no wheel of tokenizers 0.21"},
        RELEASES[6]: {"end": "kill"},
        RELEASES[7]: {"failed": ["forward.finite"], "error": ["forward.finite"]},
    }
    world.tell(world.from_on(5, failed=["forward.finite"]) | broken | {RELEASES[7]: {"error": ["forward.finite"]}})
    found = world.found(*ENDS)
    assert (found["last_good"], found["first_bad"], found["between"]) == (RELEASES[4], RELEASES[8], RELEASES[5:8])
    reasons = {step["version"]: step["reason"] for step in found["tested"] if step["verdict"] == "untestable"}
    assert set(reasons) == set(RELEASES[5:8])
    assert reasons[RELEASES[5]] == "no wheel of tokenizers 0.21"
    assert "SIGKILL" in reasons[RELEASES[6]]
    _, out, _ = world.bisect(*ENDS)
    assert "between    5.5.0, 5.6.0, 5.7.0 cannot be tried: the change is in one of them" in out


def test_the_story_is_short_and_its_command_runs(world):
    world.tell(world.from_on(6, failed=["load.head-init"]))
    _, out, _ = world.bisect(*ENDS, "--precision", "bf16", "--seed", "3", "--no-diagnose")
    story = out[out.index("\nlast good") + 1 :].splitlines()
    assert [line.split()[0] for line in story] == [
        "last",
        "first",
        "subject",
        "check",
        "kind",
        "where",
        "tried",
        "show",
    ]
    command = story[-1].removeprefix("show it    numerics-suite ")
    assert (
        command
        == "matrix fixture:glm4-tiny --precision bf16 --seed 3 --no-diagnose --checks load.head-init --transformers 5.5.0,5.6.0"
    )
    assert main([*command.split(), "--jobs", "1"]) == 1
    assert max(len(line) for line in story[:-1]) <= 80


def test_torch_is_searched_likewise(world, monkeypatch):
    monkeypatch.setattr(
        fake_versions.FakeEnvironment,
        "__init__",
        lambda self, file, _, torch: setattr(
            self, "given", {"FAKE_WORLD": str(file), "FAKE_TRANSFORMERS": torch, "FAKE_TORCH": torch}
        ),
    )
    world.tell(world.from_on(9, failed=["train.finite"]))
    found = world.found(*ENDS, "--package", "torch", "--transformers", "5.1.0")
    assert (found["what"], found["first_bad"]) == ("torch", RELEASES[9])
    assert found["show"].endswith("--transformers 5.1.0 --torch 5.8.0,5.9.0")


@pytest.mark.parametrize("package", ["accelerate", "peft", "trl", "tokenizers"])
def test_other_packages_are_searched_likewise(world, package):
    world.tell(world.from_on(7, failed=["train.finite"]))
    found = world.found(*ENDS, "--package", package, "--transformers", "5.1.0")
    assert (found["what"], found["last_good"], found["first_bad"]) == (package, RELEASES[6], RELEASES[7])
    ends = f"--with {package}==5.6.0 --with {package}==5.7.0"
    assert found["show"].endswith(f"--transformers 5.1.0 {ends}")
    assert set(world.asked) == {"5.1.0"}, "transformers stays as it was pinned"


def test_a_change_without_a_failing_check_is_found_by_a_baseline_of_the_good_end(world):
    """The world's `baseline.contract` fails where it says so, and only where a baseline is given."""
    world.tell(world.from_on(7, failed=["baseline.contract"]))
    found = world.found(*ENDS)
    assert (found["first_bad"], found["check"], found["kind"]) == (RELEASES[7], "baseline.contract", "contract")
    named = world.found(*ENDS, "--check", "baseline.contract")
    assert named["first_bad"] == RELEASES[7]
    (recorded,) = {
        json.loads(job.read_text(encoding="utf-8"))["settings"]["baseline"]
        for job in Path(".numerics/bisect").glob("*/job.json")
    } - {None}
    assert Path(recorded).parent.name.startswith(f"transformers-{RELEASES[0]}_")


def test_a_second_search_goes_on_where_the_first_was(world):
    world.tell(world.from_on(6, failed=["load.head-init"]))
    first = world.found(*ENDS)
    world.asked.clear()
    second = world.found(*ENDS)
    assert world.asked == []
    assert all(step["reused"] for step in second["tested"])
    assert first["first_bad"] == second["first_bad"]


# --- commits and revisions ---------------------------------------------------------------------------------------------


def git(folder: Path, *arguments: str) -> str:
    variables = {
        **os.environ,
        "GIT_AUTHOR_NAME": "a",
        "GIT_AUTHOR_EMAIL": "a@b",
        "GIT_COMMITTER_NAME": "a",
        "GIT_COMMITTER_EMAIL": "a@b",
        "GIT_CONFIG_GLOBAL": os.devnull,
    }
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], env=variables, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def clone(tmp_path):
    """A repository that looks like a clone of transformers: eight commits, one on a side branch."""
    folder = tmp_path / "clone"
    (folder / "src" / "transformers").mkdir(parents=True)
    git(folder, "init", "-q", "-b", "main")
    commits = []
    for number in range(8):
        (folder / "src" / "transformers" / "__init__.py").write_text(f"number = {number}\n", encoding="utf-8")
        git(folder, "add", ".")
        git(folder, "commit", "-q", "-m", f"commit {number}")
        commits.append(git(folder, "rev-parse", "HEAD"))
    return folder, commits


def test_commits_of_a_clone_are_searched_and_the_clone_is_untouched(world, clone):
    folder, commits = clone
    world.tell({f"git-{commit}": {"failed": ["forward.finite"]} for commit in commits[5:]})
    git(folder, "checkout", "-q", commits[2])
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    before = git(folder, "status", "--porcelain", "--branch"), git(folder, "worktree", "list")
    found = world.found("--git", str(folder), "--good", commits[0], "--bad", "main")
    assert (found["last_good"], found["first_bad"]) == (commits[4][:12], commits[5][:12])
    assert (git(folder, "status", "--porcelain", "--branch"), git(folder, "worktree", "list")) == before


def test_ends_of_a_clone_are_judged_first(world, clone):
    folder, commits = clone
    git(folder, "checkout", "-q", "-b", "side", commits[1])
    git(folder, "commit", "-q", "--allow-empty", "-m", "aside")
    for good, bad, line in (
        (commits[3], commits[1], "is newer than"),
        (commits[3], commits[3], "are both"),
        ("nowhere", "main", "has no commit 'nowhere'"),
        ("side", "main", "is no ancestor of"),
    ):
        status, _, err = world.bisect("--git", str(folder), "--good", good, "--bad", bad)
        assert (status, err.count("\n")) == (4, 1)
        assert line in err
    status, _, err = world.bisect("--git", str(world.file.parent / "cache"), "--good", "a", "--bad", "b")
    assert (status, "no such directory" in err) == (4, True)


@pytest.fixture
def answering(monkeypatch):
    """The running environment answers by the bytes of the checkpoint: `bad` in its config fails."""

    class Running:
        def command(self, module, *arguments):
            return fake_versions.cell_command(*arguments)

        def variables(self):
            return {**os.environ, "FAKE_WORLD": "world.json", "FAKE_TRANSFORMERS": "by-config", "FAKE_TORCH": "1"}

    monkeypatch.setattr("numerics_suite.versions.matrix.RunningEnvironment", Running)


def test_commits_of_a_checkpoint_are_searched(world, tmp_path, answering):
    root = tmp_path / "repository"
    folder = root / "models" / "mine"
    shutil.copytree(fixture_path("glm4-tiny"), folder)
    git(root, "init", "-q", "-b", "main")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    commits = []
    for number in range(6):
        (folder / "config.json").write_text(
            json.dumps({**config, "number": number, "bad": number >= 4}), encoding="utf-8"
        )
        git(root, "add", ".")
        git(root, "commit", "-q", "-m", f"commit {number}")
        commits.append(git(root, "rev-parse", "HEAD"))
        git(root, "commit", "-q", "--allow-empty", "-m", "elsewhere")
    found = world.found("--package", "checkpoint", "--good", commits[0], "--bad", commits[5], subject=str(folder))
    assert (found["subject"], found["last_good"], found["first_bad"]) == ("mine", commits[3][:12], commits[4][:12])
    assert found["show"] == f"git -C {root} diff {commits[3][:12]} {commits[4][:12]} -- models/mine"
    assert git(root, "status", "--porcelain") == ""
    assert not list((tmp_path / "cache" / "revisions").rglob("config.json"))


def test_files_of_a_commit_stay_while_anybody_uses_them(tmp_path, monkeypatch):
    """Two searches of one repository share a folder: the one that ends first leaves the other's files alone."""
    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "repository" / "checkpoint"
    folder.mkdir(parents=True)
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    for word in ("one", "two"):
        (folder / "config.json").write_text(word)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", word], check=True)
    candidate = of_checkpoint(str(folder), "HEAD~1", "HEAD")[0][-1]
    file = Path(candidate.subject) / "config.json"
    file.parent.mkdir(parents=True)
    file.write_text("half of it")  # of a run that was killed
    waits = "import sys; print(flush=True); sys.stdin.read()"
    other = f"from numerics_suite.versions.revisions import brought, of_checkpoint\nwith brought(of_checkpoint({str(folder)!r}, 'HEAD~1', 'HEAD')[0][-1]): {waits}"
    with subprocess.Popen(
        [sys.executable, "-c", other], env=ENVIRONMENT | {"NUMERICS_SUITE_CACHE": str(tmp_path / "cache")},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        process.stdout.readline()
        assert file.read_text() == "two"
        with brought(candidate):
            assert file.read_text() == "two"
        assert file.read_text() == "two"
        with brought(candidate):
            process.stdin.close()
            assert process.wait(60) == 0
            assert file.read_text() == "two"
    assert not file.parent.exists()


def test_revisions_in_the_hubs_cache_are_searched(world, tmp_path, answering, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "hub" / "models--org--name"
    revisions = [character * 40 for character in "fa3c1"]
    config = json.loads((fixture_path("glm4-tiny") / "config.json").read_text(encoding="utf-8"))
    for number, revision in enumerate(revisions):
        folder = place / "snapshots" / revision
        shutil.copytree(fixture_path("glm4-tiny"), folder)
        (folder / "config.json").write_text(json.dumps({**config, "bad": number >= 3}), encoding="utf-8")
        os.utime(folder, (1000 + number, 1000 + number))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revisions[-1], encoding="utf-8")
    found = world.found("--package", "checkpoint", "--good", "ffff", "--bad", "main", subject="org/name")
    assert (found["subject"], found["last_good"], found["first_bad"]) == ("org/name", "3" * 12, "c" * 12)
    assert found["notes"] == ["revisions are in the order in which they were fetched, for the hub cannot be asked"]
    assert found["show"].startswith(f"numerics-suite check org/name@{'c' * 12} ")
    for good, bad, line in (
        ("main", "ffff", "is newer than"),
        ("0000", "main", "is not in the hub's cache"),
        ("main", "1111", "are both"),
    ):
        status, _, err = world.bisect("--package", "checkpoint", "--good", good, "--bad", bad, subject="org/name")
        assert (status, line in err) == (4, True), err


# --- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--good", "5.8.0", "--bad", "5.1.0"], "--good 5.8.0 is newer than --bad 5.1.0: swap them (--good 5.1.0 --bad 5.8.0)"),
        (["--good", "5.1.0", "--bad", "5.1"], "--good and --bad are both 5.1"),
        (["--good", "5.1.1", "--bad", "5.8.0"], "--good: there is no transformers 5.1.1 for this Python; the nearest is 5.1.0"),
        (["--good", "5.1.0", "--bad", "5.8.x"], "--bad: '5.8.x' is not a version"),
        (["--good", "5.1.0"], "bisect needs both ends: --bad is missing"),
        (["--bad", "5.1.0"], "bisect needs both ends: --good is missing"),
        (["fixture:glm-tiny", *ENDS], "bisect takes one SUBJECT, and 2 were given"),
        ([*ENDS, "--package", "trch"], "--package: unknown 'trch'; did you mean 'torch'?"),
        ([*ENDS, "--package", "torch", "--git", "."], "--git searches transformers, and --package torch was given"),
        ([*ENDS, "--transformers", "5.0.0"], "--transformers is what is searched; leave it out"),
        ([*ENDS, "--package", "checkpoint", "--torch", "2.8.0"], "--package checkpoint runs in the environment at hand"),
        ([*ENDS, "--package", "checkpoint"], "only a hub id or a directory in a git repository has revisions"),
        ([*ENDS, "--check", "load.hed-init"], "load.hed-init"),
        ([*ENDS, "--jobs", "many"], "--jobs: must be a whole number of at least 1, not 'many'"),
        ([*ENDS, "--out", "world.json"], "--out: cannot write "),
        ([*ENDS, "--json", "no/out"], "--json: cannot write no/out: no folder "),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_4(world, arguments, line):
    status, out, err = world.bisect(*arguments)
    assert (status, err.count("\n")) == (4, 1), (out, err)
    assert line in err
    assert world.asked == []


@pytest.mark.parametrize(
    ("entries", "line"),
    [
        ({}, "the bad end 5.11.0 does not hold: nothing fails there, nor does it differ from a baseline of 5.0.0 (1 check passed)"),
        ({RELEASES[1]: {"failed": ["forward.finite"]}}, "the bad end 5.11.0 does not hold: nothing fails there (1 check passed)"),
        ({release: {"failed": ["forward.finite"]} for release in RELEASES},
         "the good end 5.0.0 does not hold: forward.finite/glm4-tiny/bf16/sdpa/cpu (uninitialised-parameters) fails there too"),
        ({RELEASES[-1]: {"end": "exit"}}, "the bad end 5.11.0 cannot be tried: its process ended with status 1: ImportError"),
        ({RELEASES[0]: {"install": "no wheel"}, RELEASES[-1]: {"failed": ["forward.finite"]}}, "the good end 5.0.0 cannot be tried: no wheel"),
        ({RELEASES[-1]: {"unsupported": ["glm4-tiny"]}}, "the bad end 5.11.0 cannot be tried: transformers 5.11.0 has no glm4-tiny"),
        ({RELEASES[0]: {"error": ["forward.finite"]}, RELEASES[-1]: {"failed": ["forward.finite"]}},
         "the good end 5.0.0 does not hold: forward.finite/glm4-tiny/bf16/sdpa/cpu is error there"),
        ({"no uv": "environments per version are made by uv"}, "environments per version are made by uv"),
    ],
)  # fmt: skip
def test_an_end_that_does_not_hold_is_one_line_and_exit_4(world, entries, line):
    world.tell(entries)
    status, _, err = world.bisect(*ENDS, *(["--check", "forward.finite"] if entries else []))
    assert (status, err.count("\n")) == (4, 1)
    assert line in err


# --- how it is stopped -------------------------------------------------------------------------------------------------


def test_stopping_keeps_what_is_done_and_ends_every_process(tmp_path):
    slow = {release: {"seconds": 60} for release in RELEASES[1:-1]} | {RELEASES[-1]: {"failed": ["forward.finite"]}}
    (tmp_path / "world.json").write_text(json.dumps({"releases": RELEASES, **slow}), encoding="utf-8")
    running = begin(tmp_path, "bisect", *ENDS)
    out = tmp_path / ".numerics" / "bisect"
    deadline = time.monotonic() + 30
    while not processes_of(tmp_path) or len(whole(out)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert running.returncode == 2, err
    assert "2 finished kept in" in err
    assert len(whole(out)) == 2
    assert processes_of(tmp_path) == []


@pytest.mark.slow
def test_fifty_kills_lose_no_result(tmp_path):
    bad = {release: {"failed": ["forward.finite"]} for release in RELEASES[7:]}
    (tmp_path / "world.json").write_text(json.dumps({"releases": RELEASES, **bad}), encoding="utf-8")
    assert ENVIRONMENT
    kill_at_random(tmp_path, "bisect", [*ENDS], 50, 4.0)
