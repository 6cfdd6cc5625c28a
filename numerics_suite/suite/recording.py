"""`numerics-suite record`: every planned cell measured, one cell's failure never in the way of another's."""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from typing import Any

from numerics_suite.baselines.measure import measure_cell
from numerics_suite.baselines.records import CellBaseline, Recorded
from numerics_suite.checks.baseline._difference import measured_as
from numerics_suite.core.activity import doing
from numerics_suite.core.errors import NumericsSuiteError, UnusableError
from numerics_suite.core.records import Cell
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.files import digests_from_json, digests_to_json
from numerics_suite.suite.planning import SuitePlan, applicable_checks
from numerics_suite.suite.run import threads_of_each, variables, worker_count
from numerics_suite.suite.session import SuiteSession, error_line


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What a worker says of a cell."""

    baseline: CellBaseline | None = None
    error: str = ""
    bad_input: bool = False


def recording_session(settings: Settings) -> SuiteSession:
    """The session whose plan has every check: what a baseline says that applies does not depend on `--checks`.

    Args:
        settings: as used.
    """
    return SuiteSession(replace(settings, checks=(), skip=("baseline.*",), data=None))


def skipped_cells(plan: SuitePlan) -> dict[Cell, str]:
    """Cells of which nothing can be asked here, with the reason.

    Args:
        plan: with every check.
    """
    open_to = {question.cell for question in plan.questions if question.skip is None}
    reasons: dict[Cell, str] = {}
    for question in plan.questions:
        if question.cell not in open_to and question.skip is not None:
            reasons.setdefault(question.cell, question.skip)
    return reasons


def record_cells(
    settings: Settings, on_progress: Callable[[Recorded], object], session: SuiteSession | None = None
) -> tuple[CellBaseline, ...]:
    """Measure every planned cell.

    Args:
        settings: as used.
        on_progress: told of each cell as soon as it is done; what it raises ends the work.
        session: of :func:`recording_session`, where its plan is made already.

    Returns:
        The cells that could be measured, in the order of the plan.

    Raises:
        BadInputError: something that the user named cannot be used.
    """
    session = session or recording_session(settings)
    plan, skipped = session.plan, skipped_cells(session.plan)
    wanted = [cell for cell in plan.cells if cell not in skipped]
    total, done = len(plan.cells), 0
    for cell, reason in skipped.items():
        done += 1
        on_progress(Recorded(done=done, total=total, cell=cell, skipped=reason))
    measured: dict[Cell, CellBaseline] = {}
    with contextlib.closing(_answers(session, wanted, min(worker_count(settings, plan), len(wanted)))) as answers:
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


def _answers(session: SuiteSession, cells: list[Cell], workers: int) -> Generator[tuple[Cell, _Answer], None, None]:
    if workers < 2:
        for cell in cells:
            yield cell, _measured(session, cell)
        return
    own = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": threads_of_each(workers)}
    with variables(own):
        lost: list[Cell] = []
        with contextlib.closing(_in_workers(session, cells, workers)) as answers:
            for cell, answer in answers:
                if answer is None:
                    lost.append(cell)
                else:
                    yield cell, answer
        # A worker that dies takes the other workers' cells along. Each by itself shows which one it was.
        for cell in lost:
            with contextlib.closing(_in_workers(session, [cell], 1)) as answers:
                for _, answer in answers:
                    yield cell, answer or _Answer(error=DIED)


DIED = "a worker process ended before it had an answer: out of memory, or killed"


def _in_workers(
    session: SuiteSession, cells: list[Cell], workers: int
) -> Generator[tuple[Cell, _Answer | None], None, None]:
    """The cells as they are measured, None for those of which a worker's death left nothing."""
    others = set(multiprocessing.active_children())
    pool = concurrent.futures.ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=_begin,
        initargs=(session.settings, digests_to_json()),
    )
    pending: dict[concurrent.futures.Future[_Answer], Cell] = {}
    try:
        for cell in cells:
            try:
                pending[pool.submit(_measured_there, cell)] = cell
            except concurrent.futures.process.BrokenProcessPool:
                yield cell, None
        for future in concurrent.futures.as_completed(pending):
            yield pending[future], _answer_of(future)
    except BaseException:
        # A cell that is half measured is of no use to anybody: whoever stops the work does not wait for it.
        for worker in set(multiprocessing.active_children()) - others:
            worker.terminate()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _answer_of(future: concurrent.futures.Future[_Answer]) -> _Answer | None:
    try:
        return future.result()
    except concurrent.futures.process.BrokenProcessPool:
        return None


_OWN: list[SuiteSession] = []
"""The session of this worker process."""


def _begin(settings: Settings, digests: list[Any]) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the terminal's Ctrl-C reaches every process; the first one acts on it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    digests_from_json(digests)
    _OWN[:] = [SuiteSession(settings)]


def _end_with_parent() -> None:
    """End this worker where the process that began it is killed: nothing else tells it, for it holds its queue's other end itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _measured_there(cell: Cell) -> _Answer:
    return _measured(_OWN[0], cell)


def _measured(session: SuiteSession, cell: Cell) -> _Answer:
    try:
        with doing(f"measuring {cell.id}"):
            return _measured_now(session, cell)
    except NumericsSuiteError as error:
        return _Answer(error=" ".join(str(error).split()), bad_input=isinstance(error, UnusableError))
    except Exception as error:  # noqa: BLE001 - one cell's failure never hides the others
        return _Answer(error=error_line(error, cell.device))


def _measured_now(session: SuiteSession, cell: Cell) -> _Answer:
    context = session.context(cell)
    if context.request.baseline is not None:  # a session that is held to a baseline: on the very same batches
        return _Answer(baseline=measured_as(context.request.baseline, context))
    checks = applicable_checks(session.plan.subjects[cell.subject], cell.precision)
    return _Answer(baseline=measure_cell(context, checks=checks))
