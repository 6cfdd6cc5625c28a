"""Jobs as processes: each in a group of its own, its output in a log, none of them outliving this process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numerics_suite.core.atomic import write_atomic
from numerics_suite.core.machine import available_bytes, core_count
from numerics_suite.reports.results import dump
from numerics_suite.versions.installers import end_running
from numerics_suite.versions.job import DONE, JOB, LOG, Job
from numerics_suite.versions.result_store import read_done

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CELL = "numerics_suite.versions.cell"
GRACE = 2.0
"""Seconds between asking a process to end and ending it."""


class RunsModules(Protocol):
    """As much of an environment as a job needs."""

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line that runs a module there."""

    def variables(self) -> Mapping[str, str]:
        """The process's whole environment."""


class RunningEnvironment:
    """The environment that this process runs in."""

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line that runs a module here."""
        return [sys.executable, "-m", module, *arguments]

    def variables(self) -> dict[str, str]:
        """This process's own, with this copy of the package first on the path."""
        own = str(Path(__file__).resolve().parents[2])
        paths = [own, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        return {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}


class Stopped(Exception):  # noqa: N818 - no error: the user stopped the run
    """The run was stopped before or while this job ran."""


class Jobs:
    """Runs jobs from any thread, and can end all of them at once."""

    def __init__(self) -> None:
        """Nothing runs yet."""
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stopped

    def stop(self) -> None:
        """End every process group, and refuse what comes later; more than once is no harm."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        end_running()  # an environment that is being made
        for process in running:
            _signal(process, signal.SIGTERM)
        deadline = time.monotonic() + GRACE
        for process in running:
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                _signal(process, signal.SIGKILL)

    def run(self, environment: RunsModules, job: Job, folder: Path) -> dict[str, Any]:
        """Run a job to its end.

        Returns:
            What `done.json` holds; where the process wrote none, an error with one line of reason, which is written too.

        Raises:
            Stopped: :meth:`stop` was called.
        """
        write_atomic(folder / JOB, dump(job.to_json()))
        variables = {**environment.variables(), "OMP_NUM_THREADS": str(job.threads), "TOKENIZERS_PARALLELISM": "false"}
        begun = time.perf_counter()
        status = self._process(environment.command(CELL, str(folder / JOB)), variables, job.cwd, folder / LOG)
        if self._stopped:
            raise Stopped
        done = read_done(folder)
        if done is None:
            done = failed(reason_of(status, folder / LOG))
        done["duration_s"] = round(time.perf_counter() - begun, 3)
        write_atomic(folder / DONE, dump(done))
        return done

    def _process(self, command: Sequence[str], variables: Mapping[str, str], cwd: str, log: Path) -> int:
        with log.open("wb") as output:
            with self._lock:
                if self._stopped:
                    raise Stopped
                # The pipe to its standard input closes with this process, however it ends; the job's process ends then.
                process = subprocess.Popen(  # noqa: S603 - our own command
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=cwd,
                    env=dict(variables),
                    start_new_session=True,
                )
                self._running.add(process)
            try:
                return process.wait()
            finally:
                with self._lock:
                    self._running.discard(process)
                if process.stdin is not None:
                    process.stdin.close()
                _signal(process, signal.SIGKILL)  # what it may have started and left


def failed(reason: str) -> dict[str, Any]:
    """The `done.json` of a job that gave no answer."""
    return {
        "status": "error",
        "results": False,
        "baseline": False,
        "reason": " ".join(reason.split()),
        "unsupported": {},
    }


def tail(log: Path) -> list[str]:
    """The last lines of a process's output, without blanks at their ends."""
    try:
        with log.open("rb") as file:
            file.seek(max(log.stat().st_size - 20_000, 0))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        text = ""
    return [line.strip() for line in text.splitlines() if line.strip()]


def reason_of(status: int, log: Path) -> str:
    """One line for a process that ended without an answer."""
    lines = tail(log)
    if status < 0:
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        memory = ", as when memory runs out" if -status == signal.SIGKILL else ""
        return f"its process was ended by {name}{memory}"
    last = lines[-1] if lines else "no output"
    return f"its process ended with status {status}: {last[:300]}"


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Send a signal to the process's group."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, number)


def default_jobs(weight_bytes: int) -> int:
    """How many jobs run at once by default: as many as cores and memory allow, four at most."""
    available = available_bytes()
    room = 4 * 1_500_000_000 if available is None else available
    return max(1, min(core_count(), 4, room // rough_bytes(weight_bytes)))


def rough_bytes(weight_bytes: int) -> int:
    """About what a job needs, from the size of its largest subject's files alone."""
    return 1_500_000_000 + 8 * weight_bytes  # torch and a run in fp64 beside the model and its gradients
