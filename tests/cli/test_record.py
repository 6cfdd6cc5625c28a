"""`record`: what it writes, what it says, what it refuses before the work begins, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_cells_that_are_there_are_refused_before_the_work_and_overwritten_on_demand(capsys, monkeypatch):
    assert main(["record", *ONE, "--baseline", "kept"]) == 0
    before = contents(Path("kept"))
    capsys.readouterr()
    with monkeypatch.context() as patched:
        patched.setattr(recording, "measure_cell", lambda *_, **__: pytest.fail("the work began"))
        assert "--force" in refused(capsys, *ONE, "--baseline", "kept")
    assert contents(Path("kept")) == before
    assert main(["record", *ONE, "--baseline", "kept", "--seed", "3", "--force"]) == 0
    (cell,) = load(Path("kept")).values()
    assert cell.recipe["seed"] == 3


def test_another_cell_joins_those_that_are_there(capsys):
    for attn in ("eager", "sdpa"):
        assert (
            main(
                ["record", "fixture:glm4-tiny", "--precision", "bf16", "--attn", attn, "--baseline", "kept", "-n", "0"]
            )
            == 0
        )
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


def test_a_disk_that_fills_is_one_line_and_leaves_what_was_there(capsys, monkeypatch):
    assert main(["record", *ONE, "--baseline", "kept"]) == 0
    before = contents(Path("kept"))
    capsys.readouterr()
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


DEADLY = """
import multiprocessing, os, torch

def net():
    if multiprocessing.parent_process() is not None:
        os._exit(9)
    return torch.nn.Linear(2, 2), {"input": torch.ones(1, 2)}
"""


def test_a_worker_that_dies_is_an_error_of_its_cells(capsys, tmp_path, monkeypatch):
    (tmp_path / "deadly_factory.py").write_text(DEADLY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ENVIRONMENT["PYTHONPATH"], str(tmp_path)]))
    command = [
        sys.executable,
        "-m",
        "numerics_suite",
        "record",
        "factory:deadly_factory:net",
        "--precision",
        "fp32,bf16",
    ]
    done = subprocess.run(
        [*command, "--baseline", "kept", "-n", "2"], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert done.stderr.count("ERROR a worker process ended before it had an answer") == 2
    assert "Traceback" not in done.stderr


def test_cells_that_a_workers_death_took_along_are_measured_again_each_by_itself(monkeypatch):
    asked = []

    def in_workers(_session, cells, workers):
        asked.append((cells, workers))
        dies = len(cells) > 1
        yield from (
            (cell, None if (dies and cell != "first") or cell == "deadly" else f"{cell} measured") for cell in cells
        )

    monkeypatch.setattr(recording, "_in_workers", in_workers)
    told = dict(recording._answers(None, ["first", "deadly", "beside", "later"], 2))
    assert asked == [(["first", "deadly", "beside", "later"], 2), (["deadly"], 1), (["beside"], 1), (["later"], 1)]
    assert told.pop("deadly").error == recording.DIED
    assert told == {cell: f"{cell} measured" for cell in ("first", "beside", "later")}


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
