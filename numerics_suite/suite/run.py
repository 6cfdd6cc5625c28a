"""`numerics-suite check` as a pytest run with an ini of its own, no conftest of the host and no stray plugin."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis.configuration import set_hypothesis_home_dir

from numerics_suite.core import progress
from numerics_suite.core.activity import listening
from numerics_suite.core.errors import BadInputError, CheckError
from numerics_suite.core.garbage import living_set_aside, none_collected
from numerics_suite.core.interrupts import stop_if_requested
from numerics_suite.core.machine import core_count
from numerics_suite.core.records import CheckResult, RunResult
from numerics_suite.devices.kinds import CPU, kind_of
from numerics_suite.devices.speed import measure_speed
from numerics_suite.reports.streams import notices_past_capture
from numerics_suite.reports.terminal import PlanRow, Terminal
from numerics_suite.settings.tree import Settings, to_json
from numerics_suite.suite.expected_memory import cell_bytes, trains
from numerics_suite.suite.expected_time import dtypes_of, expected_seconds, run_seconds
from numerics_suite.suite.pace import Pace
from numerics_suite.suite.planning import SuitePlan
from numerics_suite.suite.session import SuiteSession
from numerics_suite.suite.stash import run_key

SUITE = Path(__file__).resolve().parent
WORTH_WORKERS = 8
"""Cells from which on starting worker processes, which import torch once each, is paid back."""


class RunContext:
    """The command in its own pytest run, as a plugin of it: lends the session, shows what goes on, and takes the result.

    Attributes:
        expected: seconds of each question by id, empty where that is unknown.
        seconds: that all of it is expected to take, None where that is unknown.
        result: of the whole run, once pytest has ended.
        complaint: of pytest, where it failed itself.
    """

    def __init__(self, session: SuiteSession, terminal: Terminal, *, asks_index: bool, workers: int) -> None:
        """Print to this terminal as the run goes on."""
        self.session, self.terminal, self.asks_index = session, terminal, asks_index
        seconds = None if session.settings.quiet else seconds_of(session.settings, session.plan)
        left = {question: each for question, each in (seconds or {}).items() if question not in session.answered}
        self.expected = seconds or {}
        self.seconds = None if seconds is None else run_seconds(left, workers)
        self._pace = Pace(left, workers)
        self.result: RunResult | None = None
        self.complaint: str | None = None

    def begin(self, environment: Mapping[str, Any]) -> None:
        """Print the header."""
        plan, told = self.session.plan, to_json(self.session.settings)
        subjects = tuple(plan.subjects.values())
        self.terminal.header(environment, subjects, plan.cells, told, data=plan.data, seconds=self.seconds)
        left = self._pace.left if self.seconds is not None else (lambda: None)
        self.terminal.follow(len(plan.questions), lambda: progress.at_work(self.session.board), left)

    def progress(self, done: int, total: int, result: CheckResult) -> None:
        """Move the progress on."""
        self._pace.answered(result.id, result.duration_s)
        self.terminal.progress(done, total, result)

    def pytest_configure(self, config: pytest.Config) -> None:
        """Let the suite's plugin take the session from here, and none from pytest's options."""
        config.stash[run_key] = self

    def pytest_internalerror(self, excrepr: object) -> bool:
        """Keep one line of what went wrong; pytest prints no trace of its own."""
        self.complaint = str(excrepr).strip().splitlines()[-1]
        return True


def worker_count(settings: Settings, plan: SuitePlan) -> int:
    """Worker processes; 0 runs in this one.

    Cells of one accelerator share it, so one process runs them unless the user says otherwise: a worker, which a new one
    replaces where the device fails for good.
    """
    asked = {question.cell for question in plan.questions if question.skip is None and question.error is None}
    if settings.workers != "auto":
        return min(int(settings.workers), max(len(asked), 1))  # a worker without a cell imports torch for nothing
    cores = core_count()
    if kind_of(plan.device) != CPU:
        return 1 if len(plan.cells) > 1 else 0
    if len(plan.cells) < WORTH_WORKERS or cores < 2:
        return 0
    return min(cores, len(plan.cells))


def run_check(session: SuiteSession, terminal: Terminal, *, asks_index: bool = False) -> RunResult:
    """Run the suite as the session's settings say; with `asks_index` other releases are tried afterwards.

    Raises:
        BadInputError: the input cannot be used.
        KeyboardInterrupt: the user stopped it before anything was asked.
        CheckError: pytest itself failed.
    """
    with notices_past_capture(), listening(terminal.notice):
        with none_collected():
            session.prepare()
        workers = worker_count(session.settings, session.plan)
        arguments = [
            str(SUITE),
            *("-c", str(SUITE / "pytest.ini"), "--rootdir", str(SUITE), "--noconftest"),
            "--import-mode=importlib",  # the default puts the folder above this package, with its other packages, first on the path
            *("-p", "numerics_suite.plugin", "-p", "xdist"),
            # Nothing shows the log that pytest keeps of each item.
            *("-p", "no:cacheprovider", "-p", "no:terminal", "-p", "no:logging"),
        ]
        if workers:
            # Each cell may take its worker along, and none of them those that come after it.
            restarts = str(len(session.plan.cells))
            arguments += ["-n", str(workers), "--dist", "loadgroup", "--max-worker-restart", restarts]
        with (
            tempfile.TemporaryDirectory(prefix="numerics-suite-") as scratch,
            _clean_pytest_environment(workers, scratch),
        ):
            session.board = Path(scratch, "at-work")
            session.board.mkdir()
            run = RunContext(session, terminal, asks_index=asks_index, workers=workers)
            with living_set_aside():
                status = int(pytest.main(arguments, plugins=[run]))
    terminal.stop()
    session.release()
    if run.result is not None:
        return run.result
    stop_if_requested()
    if status == pytest.ExitCode.USAGE_ERROR:
        raise BadInputError(run.complaint or "pytest refused the options")
    raise CheckError(run.complaint or f"the test run ended with pytest status {status}")


@contextlib.contextmanager
def _clean_pytest_environment(workers: int, scratch: str) -> Iterator[None]:
    """Without the host's pytest options and plugins; with as many threads per worker as there are cores for it.

    Args:
        workers: worker processes.
        scratch: folder for what Hypothesis writes, which would else be the folder that the command runs in.
    """
    changed = {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTEST_ADDOPTS": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HYPOTHESIS_STORAGE_DIRECTORY": scratch,
    }
    if workers > 1:
        changed["OMP_NUM_THREADS"] = threads_of_each(workers)
    set_hypothesis_home_dir(scratch)  # of this process, which may have read the variable before
    try:
        with variables(changed):
            yield
    finally:
        set_hypothesis_home_dir(None)


@contextlib.contextmanager
def variables(changed: Mapping[str, str]) -> Iterator[None]:
    """This process's variables, which its workers inherit, with these values while it lasts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setenv(name, value)
        yield


def threads_of_each(workers: int) -> str:
    """As many threads for each worker as there are cores for it."""
    return str(max(1, core_count() // workers))


def seconds_of(settings: Settings, plan: SuitePlan) -> dict[str, float] | None:
    """What each question is expected to take, None on a device that has no float64, or that cannot be measured."""
    try:
        return expected_seconds(plan, settings, measure_speed(plan.device, dtypes_of(plan)))
    except (RuntimeError, TypeError, ValueError, MemoryError):
        return None  # an estimate is no reason to end a run


def planned(settings: Settings) -> tuple[list[PlanRow], float | None]:
    """The planned cells with the memory and the time that each is expected to need, for `--list`, and the time of all."""
    session = SuiteSession(settings)
    plan = session.plan
    seconds = seconds_of(settings, plan)
    rows = []
    for cell in plan.cells:
        asked = [question for question in plan.questions if question.cell == cell]
        checks = {question.check for question in asked if not question.skip}
        subject, scope = plan.subjects[cell.subject], session.train_scope(cell)
        training = trains(cell, checks)
        size = cell_bytes(subject, cell, settings, asked=checks, scope=scope)
        skipped = {question.skip for question in asked if question.skip}
        part = (f"trains {scope}",) if training and settings.train_scope == "auto" and scope != "full" else ()
        note = (
            next(iter(skipped))
            if asked and all(question.skip for question in asked)
            else "; ".join((*subject.notes, *part))
        )
        time_ = None if seconds is None else sum(seconds[question.id] for question in asked)
        rows.append(PlanRow(cell=cell, checks=sum(not q.skip for q in asked), bytes=size, seconds=time_, note=note))
    return rows, None if seconds is None else run_seconds(seconds, worker_count(settings, plan))
