"""`numerics-suite record`: every planned cell measured, one cell's failure never in the way of another's."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace

from numerics_suite.baselines.measure import measure_cell
from numerics_suite.baselines.records import CellBaseline, Recorded
from numerics_suite.checks.baseline._difference import measured_as
from numerics_suite.core.activity import doing
from numerics_suite.core.deaths import death_text, peak_of_children
from numerics_suite.core.errors import NumericsSuiteError, UnusableError
from numerics_suite.core.records import Cell
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.planning import SuitePlan, applicable_checks
from numerics_suite.suite.run import threads_of_each, variables, worker_count
from numerics_suite.suite.session import SuiteSession, error_line


@dataclass(frozen=True, slots=True, kw_only=True)
class CellAnswer:
    """What a worker says of a cell."""

    baseline: CellBaseline | None = None
    error: str = ""
    bad_input: bool = False


def recording_session(settings: Settings) -> SuiteSession:
    """The session whose plan has every check: what a baseline says that applies does not depend on `--checks`."""
    return SuiteSession(replace(settings, checks=(), skip=("baseline.*",), data=None))


def skipped_cells(plan: SuitePlan) -> dict[Cell, str]:
    """Cells of which nothing can be asked here, with the reason."""
    open_to = {question.cell for question in plan.questions if question.skip is None}
    reasons: dict[Cell, str] = {}
    for question in plan.questions:
        if question.cell not in open_to and question.skip is not None:
            reasons.setdefault(question.cell, question.skip)
    return reasons


def record_cells(session: SuiteSession, on_progress: Callable[[Recorded], object]) -> tuple[CellBaseline, ...]:
    """Measure every planned cell; what `on_progress` raises ends the work.

    Returns:
        The cells that could be measured, in the order of the plan.

    Raises:
        BadInputError: something that the user named cannot be used.
    """
    plan, skipped = session.plan, skipped_cells(session.plan)
    wanted = [cell for cell in plan.cells if cell not in skipped]
    total, done = len(plan.cells), 0
    for cell, reason in skipped.items():
        done += 1
        on_progress(Recorded(done=done, total=total, cell=cell, skipped=reason))
    measured: dict[Cell, CellBaseline] = {}
    with contextlib.closing(
        _answers(session, wanted, min(worker_count(session.settings, plan), len(wanted)))
    ) as answers:
        for cell, answer in answers:
            done += 1
            if answer.baseline is not None:
                measured[cell] = answer.baseline
            on_progress(
                Recorded(
                    done=done,
                    total=total,
                    cell=cell,
                    baseline=answer.baseline,
                    error=answer.error,
                    bad_input=answer.bad_input,
                )
            )
    return tuple(measured[cell] for cell in plan.cells if cell in measured)


def _answers(session: SuiteSession, cells: list[Cell], workers: int) -> Generator[tuple[Cell, CellAnswer], None, None]:
    if workers < 2:
        for cell in cells:
            yield cell, cell_answer(session, cell)
        return
    own = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads_of_each(workers)}
    crew = _Workers(session)
    threads = ThreadPoolExecutor(workers)
    with variables(own):
        try:
            pending = {threads.submit(crew.ask, cell): cell for cell in cells}
            for future in as_completed(pending):
                yield pending[future], future.result()
        finally:
            # A cell that is half measured is of no use to anybody: whoever stops the work does not wait for it.
            crew.end()
            threads.shutdown(wait=True, cancel_futures=True)


GRACE = 5.0
"""Seconds that a worker without an answer has to end by itself; the report says how it ended."""


class _Workers:
    """Processes that measure cells, each begun when there is a cell for it."""

    def __init__(self, session: SuiteSession) -> None:
        self._begin_with = pickle.dumps(session)
        self._lock, self._ended = threading.Lock(), False
        self._all, self._idle = list[subprocess.Popen[bytes]](), list[subprocess.Popen[bytes]]()

    def ask(self, cell: Cell) -> CellAnswer:
        """What a worker says of a cell; from any thread. Its death is an error of this cell alone."""
        worker = self._worker()
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            worker.stdin.write(pickle.dumps(cell))
            worker.stdin.flush()
            answer: CellAnswer = pickle.load(worker.stdout)  # noqa: S301 - our own process's
        except (OSError, EOFError, pickle.UnpicklingError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(GRACE)
            worker.kill()  # one that has closed its output and goes on
            how = death_text(worker.wait(), peak_of_children())
            return CellAnswer(error=f"the worker process was {how}")
        with self._lock:
            self._idle.append(worker)
        return answer

    def _worker(self) -> subprocess.Popen[bytes]:
        with self._lock:
            if self._ended:
                raise concurrent.futures.CancelledError
            while self._idle:
                worker = self._idle.pop()
                if worker.poll() is None:
                    return worker
            worker = subprocess.Popen(
                [sys.executable, "-m", "numerics_suite.suite.recording_worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.curdir for path in sys.path)},
                start_new_session=True,  # the terminal's Ctrl-C reaches this process alone, which acts on it
            )
            self._all.append(worker)
        assert worker.stdin is not None
        with contextlib.suppress(OSError):  # it is dead already: whoever asks it sees that
            worker.stdin.write(self._begin_with)
        return worker

    def end(self) -> None:
        """Let the idle ones end, and end those that are at work."""
        with self._lock:
            self._ended = True
        for worker in self._all:
            if worker not in self._idle:
                worker.kill()
            for pipe in filter(None, (worker.stdin, worker.stdout)):
                with contextlib.suppress(OSError):  # what it did not read any more
                    pipe.close()
        for worker in self._all:
            worker.wait()


def cell_answer(session: SuiteSession, cell: Cell) -> CellAnswer:
    """The baseline of a cell, or why there is none."""
    try:
        with doing(f"measuring {cell.id}"):
            return _measured(session, cell)
    except NumericsSuiteError as error:
        return CellAnswer(error=" ".join(str(error).split()), bad_input=isinstance(error, UnusableError))
    except Exception as error:  # noqa: BLE001 - one cell's failure never hides the others
        return CellAnswer(error=error_line(error, cell.device))


def _measured(session: SuiteSession, cell: Cell) -> CellAnswer:
    context = session.context(cell)
    if context.request.baseline is not None:  # compared with a baseline: on the very same batches
        return CellAnswer(baseline=measured_as(context.request.baseline, context))
    checks = applicable_checks(session.plan.subjects[cell.subject], cell.precision)
    return CellAnswer(baseline=measure_cell(context, checks=checks))
