"""Kills at random moments: no run hangs, is green with an open question, or loses an answer that it showed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

KILLS = int(os.environ.get("NUMERICS_SUITE_KILLS", "50"))
"""Runs that are stopped, of each command in each way."""

MODEL = """
import time
import torch
from torch import nn

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, input):
        time.sleep(0.05)
        return self.linear(input)

def make():
    return Slow(), {"input": torch.ones(2, 4)}

def diverged():
    made = Slow()
    made.linear.weight.data[0, 0] = float("nan")
    return made, {"input": torch.ones(2, 4)}
"""
MODULES = ("--precision", "fp32,bf16", "--no-diagnose")
SOUND, DIVERGED = "factory:made_here:make", "factory:made_here:diverged"
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
COMMANDS = {
    "check": ("check", SOUND, *MODULES, "-n", "0"),
    "check with workers": ("check", SOUND, *MODULES, "-n", "2"),
    "check with findings": ("check", SOUND, DIVERGED, *MODULES, "--checks", "load.*,*.finite", "-n", "2"),
    "record": ("record", SOUND, *MODULES[:2], "--steps", "2", "--baseline", "kept", "-n", "0"),
    "record with workers": ("record", SOUND, *MODULES[:2], "--steps", "2", "--baseline", "kept", "-n", "2"),
    "matrix": ("matrix", SOUND, *MODULES, "--python", VERSION, "--out", "out"),
    "bisect": (
        *("bisect", "repository/checkpoint", "--package", "checkpoint", "--good", "HEAD~2", "--bad", "HEAD"),
        *("--check", "load.finite", "--precision", "fp32", "--attn", "eager", "--no-diagnose", "--out", "out"),
    ),
}
LONGEST = 60.0
"""Seconds within which a run is over after it was stopped; a loaded machine takes several for one import of torch."""

LATE = 1.0
"""Seconds that an answer may be shown before it is in the file, where nobody asked the run to stop."""

pytestmark = pytest.mark.slow


class Lines(threading.Thread):
    """What a stream said, with the moment of each line."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(daemon=True)
        self.stream, self.lines = stream, list[tuple[float, str]]()
        self.start()

    def run(self) -> None:
        for line in self.stream:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    def text(self, until: float = float("inf")) -> str:
        return "\n".join(line for at, line in list(self.lines) if at <= until)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """A run that was stopped, or came to its end before that."""

    status: int
    document: dict[str, Any] | None
    out: str
    err: str
    shown: set[tuple[str, ...]]
    left: list[int]
    how: str
    alone: float | None
    """Seconds that it took, where it came to its end before the signal."""


class Running:
    """One run of a command, and what it says."""

    def __init__(self, folder: Path, command: str) -> None:
        for name in ("out", "kept"):  # what an earlier run finished would be found there, and nothing done
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "out.json").unlink(missing_ok=True)
        paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.folder, self.begun = folder, time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "numerics_suite", *COMMANDS[command], "--json", "out.json"],
            cwd=folder, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.out, self.err = Lines(self.process.stdout), Lines(self.process.stderr)

    def tree(self) -> list[int]:
        """The process and all below it."""
        found = [self.process.pid]
        for at in found:
            with contextlib.suppress(OSError):
                for task in Path(f"/proc/{at}/task").iterdir():
                    found += [int(child) for child in (task / "children").read_text().split()]
        return found

    def read(self) -> dict[str, Any] | None:
        """The results file, which is whole wherever it is there."""
        file = self.folder / "out.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def wait(self, longest: float) -> int:
        """The exit status, once nothing of the tree holds the streams any more."""
        deadline = time.monotonic() + longest
        status = self.process.wait(longest)
        for stream in (self.out, self.err):
            stream.join(max(deadline - time.monotonic(), 1.0))
            assert not stream.is_alive(), "a process of the run is left, and holds its output"
        return status

    def stop(self, draw: random.Random, takes: float, number: signal.Signals) -> Stopped:
        """Send a signal at a random moment: SIGKILL to any process of the tree, SIGTERM to the first."""
        moment = draw.uniform(0.1, takes)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(moment)
        early = LATE if number == signal.SIGKILL else 0.0
        # The file first: what it holds now may not go again.
        shown = answers(self.read()) | shown_answers(self.out.text(until=time.monotonic() - early))
        alone = None if self.process.poll() is None else time.monotonic() - self.begun
        tree = self.tree()
        victim = draw.choice(tree) if number == signal.SIGKILL else self.process.pid
        what = _command_line(victim)
        if alone is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, number)
        status = self.wait(takes * 3 + LONGEST)
        return Stopped(
            status=status, document=self.read(), out=self.out.text(), err=self.err.text(), shown=shown, left=_left(tree), alone=alone,
            how=f"{number.name} after {moment:.2f} of {takes:.2f} s to {victim} of {tree}: {what}",
        )  # fmt: skip


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:300]
    except OSError:
        return "gone"


def _left(pids: list[int]) -> list[int]:
    """Those that live on after the run is over."""
    deadline = time.monotonic() + LONGEST
    while left := [pid for pid in pids if _lives(pid)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return left


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


CELL = ("subject", "task", "precision", "attn", "device")


def answers(document: dict[str, Any] | None) -> set[tuple[str, ...]]:
    """What a document of any command holds, by what tells one answer from another."""
    if document is None:
        return set()
    if "checks" in document:
        return {tuple(entry["id"].split("/")) for entry in document["checks"]}
    if "baselines" in document:
        return {tuple(entry[name] for name in CELL) for entry in (*document["baselines"], *document["errors"])}
    if "cells" in document:
        return {(str(entry["transformers"]), str(entry["torch"])) for entry in document["cells"]}
    return {(entry["version"],) for entry in document["tested"]}


SHOWN = (
    re.compile(r"^(?:FAIL|ERR) +(\S+?)[ /](\S+?): ", re.MULTILINE),
    re.compile(r"^(\S+) (module) (\S+) (\S+) (\S+): (?:error|ERROR) ", re.MULTILINE),
    re.compile(r"^(?:ok|FAIL|ERR) +transformers (\S+), torch (\S+),", re.MULTILINE),
    re.compile(r"^(?:good|bad) +([0-9a-f]{12}) \(", re.MULTILINE),
)
"""How an answer is shown while `check`, `record`, `matrix` and `bisect` go on."""


def shown_answers(text: str) -> set[tuple[str, ...]]:
    text = re.sub(r"\n +", " ", text)  # long lines are wrapped
    return {tuple("/".join(found.groups()).split("/")) for pattern in SHOWN for found in pattern.finditer(text)}


def judge(command: str, stopped: Stopped, whole: set[tuple[str, ...]]) -> None:
    """The contract's words on how a run may end."""
    document, told = stopped.document, f"{stopped.how}\nstatus {stopped.status}\n{stopped.out}\n{stopped.err}"
    assert "Traceback" not in stopped.out + stopped.err, told
    assert not stopped.left, told
    assert stopped.shown <= answers(document), f"lost {stopped.shown - answers(document)}\n{told}"
    if document is not None and not document["complete"]:
        assert document["verdict"] == "error", told
    statuses = {entry["status"] for name in ("checks", "cells") for entry in (document or {}).get(name, ())}
    if stopped.status == 0:
        assert document is not None, told
        assert (document["complete"], document["verdict"]) == (True, "pass"), told
        assert "error" not in statuses, told
        assert answers(document) == whole, told
    elif stopped.status == 1:
        assert command == "check with findings", told
        assert "failed" in statuses, told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "made_here.py").write_text(MODEL, encoding="utf-8")
    return tmp_path


def repository(folder: Path) -> None:
    """Three commits of a checkpoint; the last one holds a NaN."""
    import torch
    from safetensors.torch import load_file, save_file

    from numerics_suite.subjects.fixtures import fixture_path

    checkpoint = folder / "repository" / "checkpoint"
    shutil.copytree(fixture_path("glm-tiny"), checkpoint)
    git = ["git", "-C", str(checkpoint), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    for value in (0.5, 0.25, float("nan")):
        for file in checkpoint.glob("*.safetensors"):
            weights = load_file(file)
            next(iter(weights.values())).view(-1)[0] = torch.tensor(value)
            save_file(weights, file, metadata={"format": "pt"})
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", str(value)], check=True)


@pytest.fixture(params=list(COMMANDS))
def measured(request: pytest.FixtureRequest, folder: Path) -> tuple[str, float, set[tuple[str, ...]]]:
    """A command, how long it takes when nobody stops it, and all that it answers then."""
    command = request.param
    if command == "bisect":
        repository(folder)
    for _ in range(2 if command == "matrix" else 1):  # the first one makes the environment
        running = Running(folder, command)
        status = running.wait(900)
        takes = time.monotonic() - running.begun
    document = running.read()
    assert document is not None, running.err.text()
    assert (status, document["complete"]) == (int(command == "check with findings"), True), running.err.text()
    whole = answers(document)
    shown = shown_answers(running.out.text())
    assert shown <= whole
    # Else the pattern that finds them is wrong, and nothing shown could be missed.
    assert bool(shown) == (command not in {"check", "check with workers"}), running.out.text()
    return command, takes, whole


def stopped_runs(folder: Path, command: str, takes: float, number: signal.Signals) -> Iterator[Stopped]:
    """As many runs as are wanted that a signal reached; a machine that has become faster ends some before it."""
    draw = random.Random(command)
    reached = 0
    while reached < KILLS:
        stopped = Running(folder, command).stop(draw, takes, number)
        takes = takes if stopped.alone is None else min(takes, stopped.alone)
        reached += stopped.alone is None
        yield stopped


def test_a_random_process_is_killed(folder: Path, measured: tuple[str, float, set[tuple[str, ...]]]) -> None:
    command, takes, whole = measured
    for stopped in stopped_runs(folder, command, takes, signal.SIGKILL):
        judge(command, stopped, whole)


def test_the_parent_is_asked_to_stop(folder: Path, measured: tuple[str, float, set[tuple[str, ...]]]) -> None:
    command, takes, whole = measured
    for stopped in stopped_runs(folder, command, takes, signal.SIGTERM):
        # Python itself needs some tenths of a second before it hears a signal; at the end the answer may be there already.
        assert stopped.status in {0, 1, 2, -signal.SIGTERM}, f"{stopped.how}\n{stopped.err}"
        judge(command, stopped, whole)
