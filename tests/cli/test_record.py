"""`record`: what it writes, what it says, what it refuses before the work begins, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from preloaded import python

import numerics_suite
from numerics_suite.baselines.store import load
from numerics_suite.cli.main import main
from numerics_suite.suite import recording

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(numerics_suite.__file__).parents[1])}
ONE = ("fixture:glm4-tiny", "--precision", "bf16", "--attn", "sdpa", "--steps", "1", "-n", "0")
TWO = ("fixture:glm4-tiny", "--precision", "bf16", "--attn", "eager,sdpa", "--steps", "1")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to run in."""
    run_in = tmp_path / "run"
    run_in.mkdir()
    monkeypatch.chdir(run_in)
    return run_in


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """What `record` of one cell writes, for tests of what becomes of it."""
    made = tmp_path_factory.mktemp("recorded") / "kept"
    assert main(["record", *ONE, "--baseline", str(made), "--quiet"]) == 0
    return made


@pytest.fixture
def kept(folder, recorded):
    """In the folder to run in."""
    return shutil.copytree(recorded, folder / "kept")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def refused(capsys, *arguments):
    """The one line of a refusal."""
    status = main(["record", *arguments])
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (4, "", 1), err
    return err.removeprefix("numerics-suite: error: ").rstrip("\n")


def test_a_cell_is_written_and_told_in_one_line(capsys, folder):
    assert main(["record", *ONE]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("\n") == 1
    assert out.startswith("glm4-tiny causal-lm bf16 sdpa cpu: error ")
    assert "roundoffs, headroom" in out
    assert out.endswith(".numerics/baselines/glm4-tiny--causal-lm.json\n")
    (cell,) = load(folder / ".numerics/baselines").values()
    assert cell.cell.id == "glm4-tiny/bf16/sdpa/cpu"
    assert cell.recipe["steps"] == 1
    assert "forward.cache" in cell.checks
    assert cell.subject["source"] == "fixture:glm4-tiny"


def test_the_answer_as_json_and_quiet(capsys):
    assert main(["record", *ONE, "--baseline", "kept", "--json", "-", "--quiet"]) == 0
    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert err == ""
    assert (answer["schema_version"], answer["command"], answer["errors"]) == (1, "record", [])
    (entry,) = answer["baselines"]
    size = sum(len(content) for content in contents(Path("kept")).values())
    assert entry == {
        "subject": "glm4-tiny",
        "task": "causal-lm",
        "precision": "bf16",
        "attn": "sdpa",
        "device": "cpu",
        "file": "kept/glm4-tiny--causal-lm.json",
        "bytes": size,
    }


@pytest.mark.slow
def test_all_default_cells_of_a_tiny_checkpoint_stay_below_100_kilobytes(capsys):
    assert main(["record", "fixture:glm4-tiny", "--baseline", "kept", "-n", "0"]) == 0
    capsys.readouterr()
    assert len(load(Path("kept"))) >= 4
    assert sum(len(content) for content in contents(Path("kept")).values()) < 100_000


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes_in_one_process_or_in_two():
    for name, workers in (("a", "0"), ("b", "2")):
        command = [sys.executable, "-m", "numerics_suite", "record", *TWO, "--baseline", name, "-n", workers, "--quiet"]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert contents(Path("a")) == contents(Path("b"))
    text = b"".join(contents(Path("a")).values())
    assert str(Path.cwd()).encode() not in text
    assert os.uname().nodename.encode() not in text


def test_cells_that_are_there_are_refused_before_the_work_and_overwritten_on_demand(capsys, monkeypatch, kept):
    before = contents(kept)
    with monkeypatch.context() as patched:
        patched.setattr(recording, "measure_cell", lambda *_, **__: pytest.fail("the work began"))
        assert "--force" in refused(capsys, *ONE, "--baseline", "kept")
    assert contents(Path("kept")) == before
    assert main(["record", *ONE, "--baseline", "kept", "--seed", "3", "--force"]) == 0
    (cell,) = load(Path("kept")).values()
    assert cell.recipe["seed"] == 3


@pytest.mark.usefixtures("kept")
def test_another_cell_joins_those_that_are_there(capsys):
    eager = [word.replace("sdpa", "eager") for word in ONE]
    assert main(["record", *eager, "--baseline", "kept"]) == 0
    assert [cell.attn for cell in load(Path("kept"))] == ["eager", "sdpa"]
    capsys.readouterr()


def test_a_cell_that_cannot_be_measured_is_told_and_the_others_are_written(capsys, monkeypatch):
    real = recording.measure_cell

    def fails(context, **keywords):
        if context.cell.attn == "eager":
            message = "two\nlines"
            raise MemoryError(message)
        return real(context, **keywords)

    monkeypatch.setattr(recording, "measure_cell", fails)
    assert main(["record", *TWO, "--baseline", "kept", "--json", "out.json", "-n", "0"]) == 3
    out, err = capsys.readouterr()
    assert "\nglm4-tiny causal-lm bf16 sdpa cpu: error " in f"\n{out}"  # a busy machine says before it what it is at
    assert err.startswith("glm4-tiny causal-lm bf16 eager cpu: ERROR out of memory on cpu: ")
    assert err.count("\n") == 1
    assert [cell.attn for cell in load(Path("kept"))] == ["sdpa"]
    answer = json.loads(Path("out.json").read_text())
    assert [entry["attn"] for entry in answer["errors"]] == ["eager"]
    assert len(answer["baselines"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fixture:glm4-tiny", "--baseline", "file"], "file"),
        (["fixture:glm4-tiny", "--baseline", "file/below"], "file"),
        (["fixture:glm5-tiny"], "glm5-tiny"),
        (["fixture:glm4-tiny", "--checks", "load.*"], "--checks"),
        (["fixture:glm4-tiny", "--max-examples", "3"], "--max-examples"),
        (["fixture:glm4-tiny", "--precision", "bf17"], "bf17"),
        (["fixture:glm4-tiny", "--forced"], "--force"),
        (["fixture:glm4-tiny", "--json", "nowhere/out.json"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, folder, arguments, words):
    Path("file").write_text("mine")
    assert words in refused(capsys, *arguments)
    assert contents(folder) == {"file": b"mine"}


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only to root")
def test_a_read_only_folder_is_refused(capsys):
    Path("kept").mkdir(mode=0o555)
    assert "kept" in refused(capsys, *ONE, "--baseline", "kept")


def test_a_disk_that_fills_is_one_line_and_leaves_what_was_there(capsys, monkeypatch, kept):
    before = contents(kept)
    from numerics_suite.core import atomic

    def full(*_args, **_keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "replace", full)
    monkeypatch.setattr(atomic.os, "fsync", full, raising=False)
    monkeypatch.setattr(Path, "replace", full)
    assert "No space left on device" in refused(capsys, *ONE, "--baseline", "kept", "--force", "--seed", "2")
    assert contents(Path("kept")) == before


@pytest.mark.slow
def test_interrupted_it_ends_with_2_and_keeps_what_was_there_and_what_was_done(capsys):
    assert main(["record", *ONE, "--baseline", "kept"]) == 0
    capsys.readouterr()
    (before,) = load(Path("kept")).values()
    command = ["fixture:glm4-tiny", "fixture:glm-tiny", "--precision", "fp32", "--baseline", "kept", "-n", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "numerics_suite", "record", *command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "numerics-suite: interrupted\n")
    assert first.startswith("glm4-tiny causal-lm fp32 eager cpu: error ")
    found = load(Path("kept"))
    assert {("bf16", "sdpa"), ("fp32", "eager")} <= {(cell.precision, cell.attn) for cell in found}
    assert found[before.cell].bits == before.bits
    assert not [path for path in Path("kept").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_interrupted_with_workers_it_ends_at_once_in_one_line():
    command = ["fixture:glm4-tiny", "fixture:glm-tiny", "--precision", "fp32,bf16", "--baseline", "kept", "-n", "2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "numerics_suite", "record", *command],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "numerics-suite: interrupted\n")
    assert 1 <= len(load(Path("kept"))) < 8


@pytest.mark.slow
def test_killed_at_any_moment_it_leaves_whole_files():
    for moment in (0.5, 0.9):
        command = [*TWO, "--baseline", "kept", "-n", "0", "--force"]
        process = subprocess.Popen(
            [sys.executable, "-m", "numerics_suite", "record", *command],
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(moment - 0.5)
        process.kill()
        process.communicate()
        assert load(Path("kept"))


FACTORIES = """
import os, signal, sys, time, torch

WORKER = "numerics_suite.suite.recording_worker" in sys.orig_argv

class Net(torch.nn.Linear):
    at_work = staticmethod(lambda: None)

    def forward(self, input):
        if WORKER:
            self.at_work()
        return super().forward(input)

def made(at_work):
    model = Net(2, 2)
    model.at_work = at_work
    return model, {"input": torch.ones(1, 2)}

def net():
    return made(lambda: None)

def deadly():
    return made(lambda: os._exit(9))

def leaving():
    return made(sys.exit)

def killed():
    return made(lambda: os.kill(os.getpid(), signal.SIGKILL))

def endless():
    return made(lambda: time.sleep(1000))
"""


def recording_of(folder: Path, *factories: str, program: str = sys.executable) -> subprocess.Popen[str]:
    """`record` of made-up modules, in two workers."""
    (folder / "made_factory.py").write_text(FACTORIES)
    path = os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(folder)])
    subjects = [word for name in factories for word in (f"factory:made_factory:{name}", "--name", name)]
    command = [program, "-m", "numerics_suite", "record", *subjects, "--precision", "fp32"]
    return subprocess.Popen(
        [*command, "--baseline", str(folder / "kept"), "-n", "2"],
        env={**ENVIRONMENT, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


DEATHS = {
    "killed": "killed, probably out of memory: ",
    "deadly": "ended with exit status 9 ",
    "leaving": "ended with exit status 0 ",
}


@pytest.mark.parametrize("names", [["killed"], pytest.param(list(DEATHS), marks=pytest.mark.slow)], ids=len)
def test_a_worker_that_dies_is_an_error_of_its_cell_alone(tmp_path, names):
    process = recording_of(tmp_path, *names, "net", program=python())
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    died = {line.split()[0]: line.partition("the worker process was ")[2] for line in err.splitlines()}
    assert died.keys() == set(names), err
    assert all(died[name].startswith(DEATHS[name]) for name in names), err
    assert out.startswith("net module fp32 "), out
    assert [cell.subject for cell in load(tmp_path / "kept")] == ["net"]


def below(pid: int) -> dict[int, str]:
    """The processes below one, with their command lines."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found |= {child: Path(f"/proc/{child}/cmdline").read_text().replace("\0", " "), **below(child)}
    return found


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_workers_end_with_a_run_that_is_killed_and_there_is_no_helper_beside_them(tmp_path):
    """A helper that is killed would have its own last words, and a worker that stays would hold the output."""
    process = recording_of(tmp_path, "endless", "net")
    deadline = time.monotonic() + 120
    while sum("recording_worker" in line for line in below(process.pid).values()) < 2 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = below(process.pid)
    (run,) = (pid for pid, line in family.items() if "recording_worker" not in line)
    assert len(family) == 3, family
    os.kill(run, signal.SIGKILL)
    out, err = process.communicate(timeout=60)  # returns once no process holds the output any more
    assert (process.returncode, "Traceback" in out + err) == (3, False), err


def test_help_has_examples_in_80_columns(capsys):
    assert main(["record", "--help"]) == 0
    out = capsys.readouterr().out
    assert "examples:" in out
    assert "--force" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.slow
def test_killed_at_50_random_moments_no_finished_cell_is_lost_and_no_file_is_broken(capsys):
    """Cells are kept as they are done: each kill leaves a baseline that reads, with at least what it held before."""
    import random

    assert main(["record", *ONE, "--quiet"]) == 0
    capsys.readouterr()
    begun = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "numerics_suite",
        "record",
        *TWO,
        "--precision",
        "bf16,fp32",
        "--force",
        "--quiet",
        "-n",
        "0",
    ]
    subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True)
    whole = time.monotonic() - begun
    held = set(load(Path(".numerics/baselines")))
    assert len(held) == 4
    chance, ended = random.Random(5), 0
    for _ in range(50):
        running = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            running.wait(chance.uniform(0.4, 1.0) * whole)
            ended += 1
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
        assert set(load(Path(".numerics/baselines"))) == held
    assert ended < 25, "most runs ended before they were killed"
