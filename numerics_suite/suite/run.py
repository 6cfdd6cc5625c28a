"""`numerics-suite check` as a pytest run with an ini of its own, no conftest of the host and no stray plugin."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis.configuration import set_hypothesis_home_dir

from numerics_suite.core import progress
from numerics_suite.core.activity import listening
from numerics_suite.core.errors import BadInputError, CheckError
from numerics_suite.core.interrupts import stop_if_requested
from numerics_suite.core.machine import core_count
from numerics_suite.core.records import Cell, CheckResult, RunResult
from numerics_suite.devices.kinds import CPU, kind_of
from numerics_suite.devices.precisions import precision
from numerics_suite.devices.speed import measure_speed
from numerics_suite.reports.streams import notices_past_capture
from numerics_suite.reports.terminal import PlanRow, Terminal
from numerics_suite.settings.options import to_args
from numerics_suite.settings.tree import Settings, to_json
from numerics_suite.subjects.memory import cell_bytes
from numerics_suite.suite.collector import Gate
from numerics_suite.suite.effort import effort_of
from numerics_suite.suite.expected_time import dtypes_of, expected_seconds, run_seconds
from numerics_suite.suite.pace import Pace
from numerics_suite.suite.planning import SuitePlan, make_plan
from numerics_suite.suite.resume import earlier_answers

SUITE = Path(__file__).resolve().parent
WORTH_WORKERS = 8
"""Cells from which on starting worker processes, which import torch once each, is paid back."""


class RunContext:
    """What the command lends to the run: the terminal, the plan, and the answers that are there already.

    Attributes:
        plan: made before pytest begins, and only once: a plan reads every byte of a checkpoint.
        answered: entries of `checks`, by id; with `--resume`.
        expected: seconds of each question by id, empty where that is unknown.
        seconds: that all of it is expected to take, None where that is unknown.
        board: folder in which workers tell what they are at.
    """

    def __init__(  # noqa: PLR0913 - what the command lends
        self,
        settings: Settings,
        terminal: Terminal,
        plan: SuitePlan,
        *,
        answered: Mapping[str, Mapping[str, Any]] | None = None,
        asks_index: bool = False,
        workers: int = 0,
        board: Path | None = None,
    ) -> None:
        """Print to this terminal as the run goes on."""
        self.settings, self.terminal, self.asks_index = settings, terminal, asks_index
        self.plan, self.answered, self.board = plan, answered or {}, board
        seconds = None if settings.quiet else seconds_of(settings, plan)
        left = {question: each for question, each in (seconds or {}).items() if question not in self.answered}
        self.expected = seconds or {}
        self.seconds = None if seconds is None else run_seconds(left, workers)
        self._pace = Pace(left, workers)

    def begin(self, plan: SuitePlan, environment: Mapping[str, Any]) -> None:
        """Print the header."""
        subjects = tuple(plan.subjects.values())
        told = to_json(self.settings)
        self.terminal.header(environment, subjects, plan.cells, told, data=plan.data, seconds=self.seconds)
        left = self._pace.left if self.seconds is not None else (lambda: None)
        self.terminal.follow(len(plan.questions), lambda: progress.at_work(self.board), left)

    def progress(self, done: int, total: int, result: CheckResult) -> None:
        """Move the progress on."""
        self._pace.answered(result.id, result.duration_s)
        self.terminal.progress(done, total, result)


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


def run_check(
    settings: Settings, terminal: Terminal, *, reproducers: Path | None = None, asks_index: bool = False
) -> RunResult:
    """Run the suite as the settings say.

    Args:
        settings: of the run.
        terminal: that shows it.
        reproducers: folder of the scripts that show a finding alone, None for the usual one.
        asks_index: other releases are tried afterwards.

    Raises:
        BadInputError: the input cannot be used.
        KeyboardInterrupt: the user stopped it before anything was asked.
        CheckError: pytest itself failed.
    """
    with notices_past_capture(), listening(terminal.notice):
        return _run_check(settings, terminal, reproducers, asks_index=asks_index)


def _run_check(settings: Settings, terminal: Terminal, reproducers: Path | None, *, asks_index: bool) -> RunResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the packages under test; as where questions are answered
        plan = make_plan(settings)
    answered = {} if settings.resume is None else earlier_answers(settings.resume, settings, plan)
    workers = worker_count(settings, plan)
    arguments = [
        str(SUITE),
        *("-c", str(SUITE / "pytest.ini"), "--rootdir", str(SUITE), "--noconftest"),
        "--import-mode=importlib",  # the default puts the folder above this package, with its other packages, first on the path
        *("-p", "numerics_suite.plugin", "-p", "xdist", "-p", "no:cacheprovider", "-p", "no:terminal"),
        *to_args(settings),
    ]
    if settings.max_time is not None:
        arguments += ["--numerics-deadline", str(time.time() + settings.max_time)]
    if reproducers is not None:
        arguments += ["--numerics-reproducers", str(reproducers)]
    if workers:
        # Each cell may take its worker along, and none of them those that come after it.
        arguments += ["-n", str(workers), "--dist", "loadgroup", "--max-worker-restart", str(len(plan.cells))]
    with tempfile.TemporaryDirectory(prefix="numerics-suite-") as scratch, _clean_pytest_environment(workers, scratch):
        board = Path(scratch) / "at-work"
        board.mkdir()
        run = RunContext(
            settings, terminal, plan, answered=answered, asks_index=asks_index, workers=workers, board=board
        )  # fmt: skip
        catcher = _Catcher(run)
        status = int(pytest.main(arguments, plugins=[catcher]))
    terminal.stop()
    gate = catcher.gate
    if gate is None or gate.result is None:
        stop_if_requested()
        if status == pytest.ExitCode.USAGE_ERROR:
            raise BadInputError(catcher.complaint or "pytest refused the options")
        message = catcher.complaint or f"the test run ended with pytest status {status}"
        raise CheckError(message)
    return gate.result


class _Catcher:
    """Lends the run to the plugin; keeps its gate, and what went wrong where there is none."""

    def __init__(self, run: RunContext) -> None:
        self.run = run
        self.gate: Gate | None = None
        self.complaint: str | None = None

    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.register(self.run, "numerics-suite-run")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        gate = session.config.pluginmanager.get_plugin("numerics-suite-gate")
        assert gate is None or isinstance(gate, Gate)
        self.gate = gate

    def pytest_internalerror(self, excrepr: object) -> bool:
        self.complaint = str(excrepr).strip().splitlines()[-1]
        return True  # told in one line; pytest prints no trace of its own


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
    """This process's variables, which its workers inherit, with these values while it lasts.

    Args:
        changed: by name.
    """
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def threads_of_each(workers: int) -> str:
    """As many threads for each worker as there are cores for it.

    Args:
        workers: processes, at least one.
    """
    return str(max(1, core_count() // workers))


def seconds_of(settings: Settings, plan: SuitePlan) -> dict[str, float] | None:
    """What each question is expected to take, None on a device that has no float64, or that cannot be measured.

    Args:
        settings: of the run.
        plan: made of them.
    """
    try:
        return expected_seconds(plan, settings, measure_speed(plan.device, dtypes_of(plan)))
    except (RuntimeError, TypeError, ValueError, MemoryError):
        return None  # an estimate is no reason to end a run


def expected_bytes(settings: Settings, plan: SuitePlan, cell: Cell) -> int | None:
    """The memory on its device that a planned cell is expected to need, None where nothing is known of its size.

    Args:
        settings: of the run.
        plan: made of them.
        cell: of the plan.
    """
    asked = [question for question in plan.questions if question.cell == cell]
    recipe, subject = precision(cell.precision), plan.subjects[cell.subject]
    return cell_bytes(
        subject,
        recipe.parameters,
        recipe.computes_in,
        training=recipe.trains and any(question.group == "train" and not question.skip for question in asked),
        batch=settings.batch_size,
        seq=settings.seq_len,
        examples=effort_of(settings).plan(subject.parameters or 0).batches,
    )


def planned(settings: Settings) -> tuple[list[PlanRow], float | None]:
    """The planned cells with the memory and the time that each is expected to need, for `--list`, and the time of all."""
    plan = make_plan(settings)
    seconds = seconds_of(settings, plan)
    rows = []
    for cell in plan.cells:
        asked = [question for question in plan.questions if question.cell == cell]
        subject, size = plan.subjects[cell.subject], expected_bytes(settings, plan, cell)
        skipped = {question.skip for question in asked if question.skip}
        note = next(iter(skipped)) if asked and all(question.skip for question in asked) else "; ".join(subject.notes)
        time_ = None if seconds is None else sum(seconds[question.id] for question in asked)
        rows.append(PlanRow(cell=cell, checks=sum(not q.skip for q in asked), bytes=size, seconds=time_, note=note))
    return rows, None if seconds is None else run_seconds(seconds, worker_count(settings, plan))
