"""How runs end: no exit status of 0 while a question is open, none of 1 without a finding, and no answer lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from preloaded import python

FACTORIES = """
import ctypes, os, signal, sys, time
import torch
from torch import nn

class Module(nn.Module):
    def __init__(self, act=lambda: None):
        super().__init__()
        self.linear, self.act = nn.Linear(4, 4), act

    def forward(self, input):
        self.act()
        return self.linear(input)

def made(act):
    return Module(act), {"input": torch.ones(2, 4)}

def sound(): return made(lambda: None)
def plain(): return nn.Linear(4, 4)
def diverged():
    module = nn.Linear(4, 4)
    module.weight.data[0, 0] = float("nan")
    return module
def exits(): sys.exit()
def exits_hard(): os._exit(0)
def interrupts(): raise KeyboardInterrupt
def exits_inside(): return made(lambda: sys.exit(0))
def interrupts_inside(): return made(lambda: os.kill(os.getpid(), signal.SIGINT) if 0 else exec("raise KeyboardInterrupt"))
def killed_inside(): return made(lambda: os.kill(os.getpid(), signal.SIGKILL))
def crashes_inside(): return made(lambda: ctypes.string_at(0))
def sleeps(): return made(lambda: time.sleep(0.4))
def fails_by_plugin(): return made(lambda: __import__("pytest").fail("Timeout >1.0s"))
def skips_by_plugin(): return made(lambda: __import__("pytest").skip("another plugin's wish"))
"""
CHECKS = ("--checks", "load.finite,load.dtype,forward.finite", "--precision", "fp32", "--no-diagnose")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made_here.py").write_text(FACTORIES, encoding="utf-8")
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def command(*names: str, arguments: tuple[str, ...] = CHECKS) -> list[str]:
    subjects = [f"factory:made_here:{name}" for name in names]
    return [python(), "-m", "numerics_suite", "check", *subjects, *arguments, "--json", "out.json"]


def check(
    folder: Path, *names: str, more: tuple[str, ...] = ("-n", "0")
) -> tuple[int, dict[str, Any], subprocess.CompletedProcess[str]]:
    done = subprocess.run(
        [*command(*names), *more], cwd=folder, env=environment(folder), capture_output=True, text=True, check=False, timeout=240
    )  # fmt: skip
    return done.returncode, json.loads((folder / "out.json").read_text(encoding="utf-8")), done


def statuses(document: dict[str, Any], subject: str) -> dict[str, str]:
    return {entry["check"]: entry["status"] for entry in document["checks"] if entry["subject"] == subject}


SOUND = {"load.dtype": "passed", "load.finite": "passed", "forward.finite": "passed"}


def test_a_factory_that_ends_the_process_is_an_error_and_the_others_are_answered(folder: Path) -> None:
    ending = ("exits", "exits_hard", "interrupts")
    status, document, done = check(folder, *ending, "sound")
    assert status == 3, done.stderr
    assert {name: set(statuses(document, name).values()) for name in ending} == {name: {"error"} for name in ending}
    assert statuses(document, "sound") == SOUND
    assert (document["complete"], document["verdict"]) == (True, "error")


STOPPED = {
    "exits_inside": "sys.exit(0)",
    "interrupts_inside": "KeyboardInterrupt",
    "fails_by_plugin": "Timeout >1.0s",
    "skips_by_plugin": "another plugin's wish",
    "killed_inside": "killed, probably out of memory: ",
    "crashes_inside": "ended by SIGSEGV",
}


def test_a_model_that_stops_its_check_is_an_error_of_that_check(folder: Path) -> None:
    """Whether it raises what is no error, or takes the process along."""
    status, document, done = check(folder, *STOPPED, "sound")
    assert status == 3, done.stderr
    assert statuses(document, "sound") == SOUND
    reasons = {entry["subject"]: entry["reason"] for entry in document["checks"] if entry["status"] == "error"}
    assert reasons.keys() == STOPPED.keys()
    for name, how in STOPPED.items():
        assert statuses(document, name) == {**SOUND, "forward.finite": "error"}
        assert how in reasons[name]


def test_a_worker_that_is_killed_is_named_with_how_it_died(folder: Path) -> None:
    status, document, done = check(folder, "killed_inside", "sound", more=("-n", "2"))
    assert status == 3, done.stderr
    assert statuses(document, "sound") == SOUND
    reasons = {entry["reason"] for entry in document["checks"] if entry["status"] == "error"}
    assert any(
        "killed, probably out of memory: " in reason and "forward.finite/killed_inside" in reason for reason in reasons
    )


def test_workers_that_cannot_begin_end_the_run(folder: Path) -> None:
    """A worker that dies while it plans would be replaced by one that does too."""
    second = "\ndef later():\n    return sound() if os.environ.get('PYTEST_XDIST_WORKER') is None else os._exit(1)\n"
    (folder / "made_here.py").write_text(FACTORIES + second, encoding="utf-8")
    status, document, done = check(folder, "later", "sound", more=("-n", "2"))
    assert status == 3, done.stderr
    unanswered = [entry for entry in document["checks"] if entry["subject"] == "later" or entry["status"] == "error"]
    assert {entry["status"] for entry in unanswered} == {"error"}
    assert all("ended with exit status 1" in entry["reason"] for entry in unanswered)


def test_a_plain_module_is_loaded_and_not_run_which_no_other_subject_hides(folder: Path) -> None:
    status, document, _ = check(folder, "plain", "sound")
    assert status == 5
    assert statuses(document, "plain") == {**SOUND, "forward.finite": "skipped"}
    assert "return (module, batch)" in next(entry["reason"] for entry in document["checks"] if entry["reason"])


def test_a_finding_in_a_plain_module_is_a_finding(folder: Path) -> None:
    status, document, _ = check(folder, "diverged")
    assert (status, document["verdict"]) == (1, "fail")
    assert statuses(document, "diverged")["load.finite"] == "failed"


def shown_answers(folder: Path) -> int:
    """Answers in the file, once one of them ran a check."""
    try:
        checks = json.loads((folder / "out.json").read_text(encoding="utf-8"))["checks"]
    except OSError:
        return 0
    return len(checks) if any(entry["check"] == "load.finite" for entry in checks) else 0


def wait_for(condition: Any, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)


SLOW = ("--checks", "load.*,forward.*,train.*", "--precision", "fp32,bf16", "--no-diagnose", "-n", "0")


@contextmanager
def default_action(number: signal.Signals) -> Iterator[None]:
    """A process that begins within does not inherit that the signal is ignored, as all do below `nohup`."""
    before = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGTERM, "0"), (signal.SIGINT, "2"), (getattr(signal, "SIGHUP", signal.SIGTERM), "0")],
)
def test_a_run_that_is_stopped_keeps_what_was_answered(folder: Path, number: signal.Signals, workers: str) -> None:
    with default_action(number):
        running = subprocess.Popen(
            [*command("sleeps", arguments=(*SLOW[:-1], workers))], cwd=folder, env=environment(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )  # fmt: skip
    wait_for(lambda: shown_answers(folder) > 2)
    seen = shown_answers(folder)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    document = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert running.returncode == 2, err
    assert (document["complete"], document["verdict"], document["exit_status"]) == (False, "error", 2)
    assert len(document["checks"]) >= seen
    assert "INTERRUPTED (exit 2)" in out
    assert "load.finite" in out


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that hang up")
def test_a_run_under_nohup_outlives_its_terminal(folder: Path) -> None:
    running = subprocess.Popen(
        ["nohup", *command("sleeps", arguments=("--checks", "load.*,forward.finite", *SLOW[2:]))], cwd=folder, env=environment(folder),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for(lambda: shown_answers(folder) > 0)
    running.send_signal(signal.SIGHUP)
    assert running.wait(timeout=120) == 0
    assert json.loads((folder / "out.json").read_text(encoding="utf-8"))["complete"]


def test_the_results_file_of_a_run_that_is_killed_holds_what_was_answered(folder: Path) -> None:
    running = subprocess.Popen(
        [*command("sleeps", arguments=SLOW)], cwd=folder, env=environment(folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # fmt: skip
    wait_for(lambda: shown_answers(folder) > 2)
    running.kill()
    running.wait()
    document = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert (document["complete"], document["verdict"]) == (False, "error")
    assert sum(document["counts"].values()) == len(document["checks"]) > 2


def test_bad_input_leaves_the_earlier_file(folder: Path) -> None:
    (folder / "out.json").write_text('{"of": "an earlier run"}')
    status, document, done = check(folder, "nothing_of_that_name")
    assert status == 4, done.stderr
    assert document == {"of": "an earlier run"}


def test_a_reader_that_is_gone_changes_no_verdict(folder: Path) -> None:
    line = " ".join(command("diverged", arguments=CHECKS)) + " -n 0 --json - | head -c 1; echo ${PIPESTATUS[0]}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment(folder), capture_output=True, text=True, check=True, timeout=240
    )  # fmt: skip
    assert done.stdout.splitlines()[-1].lstrip("{") == "1", done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


STOPPING = """
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if "test_load.py" in str(item.path) and "finite" in item.name:
        pytest.fail("Timeout >1.0s")
    if "test_load.py" in str(item.path) and "dtype" in item.name:
        pytest.skip("not today")
    if "test_forward.py" in str(item.path):
        raise SystemExit(0)
    return (yield)
"""


def test_under_pytest_a_test_that_another_plugin_stops_is_an_error(folder: Path) -> None:
    (folder / "stopping.py").write_text(STOPPING, encoding="utf-8")
    options = [f"--numerics-{word.removeprefix('--')}" if word.startswith("--") else word for word in CHECKS]
    done = subprocess.run(
        [python(), "-m", "pytest", "-p", "no:cacheprovider", "--pyargs", "numerics_suite.suite", "-p", "stopping",
         "--numerics-subject", "factory:made_here:sound", *options, "--numerics-json", "out.json"],
        cwd=folder, env=environment(folder), capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    document = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    assert done.returncode == 3, done.stdout
    assert statuses(document, "sound") == dict.fromkeys(SOUND, "error")
