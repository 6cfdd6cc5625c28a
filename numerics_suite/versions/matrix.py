"""`check` in one environment per version: cells run side by side, what is done is kept, and neighbours are compared."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numerics_suite.core.activity import telling
from numerics_suite.core.errors import BadInputError, NumericsSuiteError, UnsupportedError
from numerics_suite.core.versions import MatrixCell, MatrixResult, Versions
from numerics_suite.versions.cell_results import cell_of, minor_of
from numerics_suite.versions.changes import with_changes
from numerics_suite.versions.environments import ensure
from numerics_suite.versions.extensions import left_out_notes
from numerics_suite.versions.fingerprints import KnownSubject, digests
from numerics_suite.versions.job import LOG, Job
from numerics_suite.versions.jobs import Jobs, RunningEnvironment, Stopped, failed, tail
from numerics_suite.versions.recipes import Wanted, make_recipe
from numerics_suite.versions.result_store import ResultStore

if TYPE_CHECKING:
    from numerics_suite.settings.tree import Settings


PROGRESS = re.compile(r"\d+ of \d+ checks|\d+ s so far$")
"""In lines that a run prints of how far it is."""


class MatrixListener(Protocol):
    """Who follows the cells."""

    def doing(self, versions: Versions, what: str) -> None:
        """A cell has come to this."""

    def done(self, cell: MatrixCell, done: int, total: int) -> None:
        """One more cell has ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixPlan:
    """What is run.

    Attributes:
        settings: as a cell uses them.
        known: the subjects.
        cells: versions, oldest first, each once.
        cwd: the folder of the command.
        threads: of each cell's process.
        baseline: the folder of baselines that the cells are compared with, None without.
        check: run the suite.
        record: record baselines too.
    """

    settings: Settings
    known: tuple[KnownSubject, ...]
    cells: tuple[Versions, ...]
    cwd: Path
    threads: int
    baseline: Path | None = None
    check: bool = True
    record: bool = True

    def job(self, wanted: Wanted | None) -> Job:
        """The job of one environment.

        Raises:
            NumericsSuiteError: there can be none of these versions.
        """
        recipe = make_recipe(wanted or Wanted())
        python = recipe.python if len(recipe.python) < 12 else Path(recipe.python).name
        return Job(
            settings=self.settings,
            versions=Versions(
                transformers=recipe.transformers, torch=recipe.torch, python=python, others=recipe.others
            ),
            cwd=str(self.cwd),
            check=self.check,
            record=self.record,
            digests={
                **digests(self.settings, self.known, self.settings.baseline or self.baseline),
                "environment": recipe.digest,
            },
            threads=self.threads,
            wanted=wanted,
        )


def wanted_of(versions: Versions) -> Wanted:
    """What the environments are asked for."""
    return Wanted(
        transformers=versions.transformers, torch=versions.torch, python=versions.python, others=versions.others
    )


Execute = Callable[[Job, Path, Callable[[str], None]], dict[str, Any]]
"""Run a job in a folder, telling what is being done; the content of its `done.json`."""


def in_environments(jobs: Jobs) -> Execute:
    """Jobs as processes of this machine, each in an environment that is made when it is needed."""

    def execute(job: Job, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
        if jobs.stopped:
            raise Stopped
        tell("environment")
        if job.wanted is None:
            with telling(lambda seconds: tell(f"running for {seconds:.0f} s{_said_last(folder)}")):
                return jobs.run(RunningEnvironment(), job, folder)
        try:
            environment = ensure(job.wanted, on_progress=tell)
        except UnsupportedError:
            if jobs.stopped:  # its installer was ended
                raise Stopped from None
            raise
        tell("running")
        try:
            with telling(lambda seconds: tell(f"running for {seconds:.0f} s{_said_last(folder)}")):
                return jobs.run(environment, job, folder)
        finally:
            environment.release()

    return execute


def _said_last(folder: Path) -> str:
    """What a job's process said last of how far it is, with a colon before it; empty where it said nothing yet."""
    said = [line for line in tail(folder / LOG) if PROGRESS.search(line)]
    return f": {said[-1].removeprefix('numerics-suite: ')}" if said else ""


def planned(plan: MatrixPlan, kept: ResultStore) -> list[tuple[Versions, bool]]:
    """The cells, and whether each is done already."""
    rows = []
    for versions in plan.cells:
        try:
            job = plan.job(wanted_of(versions))
            rows.append((job.versions, kept.find(job.name) is not None))
        except NumericsSuiteError:
            rows.append((versions, False))
    return rows


def run_matrix(  # noqa: PLR0913 - keywords
    plan: MatrixPlan,
    kept: ResultStore,
    execute: Execute,
    audience: MatrixListener,
    *,
    jobs: int,
    stop: Callable[[], None],
) -> MatrixResult:
    """Run what is not done yet, and compare.

    Args:
        plan: of the matrix.
        kept: entered; what is done is found and kept there.
        execute: how a job is run.
        audience: follows every step, from any thread.
        jobs: how many run at once.
        stop: ends what runs, when the user stops.

    Raises:
        BadInputError: no cell can use the input, all for one reason.
        KeyboardInterrupt: the user stopped; what is done is kept.
    """
    begun = time.perf_counter()
    total, cells = len(plan.cells), {}
    with side_by_side(jobs, stop) as submit:
        futures = {submit(_one, plan, versions, kept, execute, audience): versions for versions in plan.cells}
        for future in as_they_end(futures):
            cells[futures[future]] = future.result()
            audience.done(cells[futures[future]], len(cells), total)
    ordered = tuple(cells[versions] for versions in plan.cells)
    _refuse_if_all(ordered, plan.known)
    compared, notes = with_changes(ordered, plan.baseline)
    duration = round(time.perf_counter() - begun, 3)
    return MatrixResult(cells=compared, folder=kept.folder, duration_s=duration, notes=(*notes, *left_out_notes()))


def _one(
    plan: MatrixPlan, versions: Versions, kept: ResultStore, execute: Execute, audience: MatrixListener
) -> MatrixCell:
    """The cell of one environment; whatever goes wrong in it stays in it."""
    try:
        job = plan.job(wanted_of(versions))
        done, folder, reused = answer(job, kept, execute, lambda what: audience.doing(versions, what))
    except (NumericsSuiteError, OSError) as error:
        return MatrixCell(
            wanted=versions,
            held=_filled(versions),
            status="error",
            verdict="error",
            reason=_line(error),
            bad_input=not isinstance(error, UnsupportedError),
        )
    return cell_of(versions, job.versions, done, folder, reused=reused)


def _filled(versions: Versions) -> Versions:
    """With what stands in for what was left open, where that much is known."""
    try:
        recipe = make_recipe(Wanted(torch=versions.torch, python=versions.python, others=versions.others))
    except NumericsSuiteError:
        return versions
    transformers = versions.transformers or recipe.transformers
    return Versions(transformers=transformers, torch=recipe.torch, python=minor_of(recipe.python), others=recipe.others)


def answer(
    job: Job, kept: ResultStore, execute: Execute, tell: Callable[[str], None]
) -> tuple[dict[str, Any], Path, bool]:
    """What a job says: kept from an earlier run, or run now and then kept.

    Returns:
        The content of `done.json`, the folder, and whether it is an earlier run's.

    Raises:
        Stopped: the user stopped.
        BadInputError: no environment can be made here, whatever the versions.
    """
    done = kept.find(job.name)
    if done is not None:
        return done, kept.folder / job.name, True
    unfinished = kept.begin(job.name)
    try:
        done = execute(job, unfinished, tell)
    except UnsupportedError as error:
        done = failed(str(error))
    except BaseException:
        kept.drop(unfinished)
        raise
    return done, kept.publish(job.name, unfinished), False


def _line(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"cannot write {error.filename or 'its files'}: {error.strerror or error}"
    return str(error)


def _refuse_if_all(cells: Sequence[MatrixCell], known: Sequence[KnownSubject]) -> None:
    """Where the input can be used in no cell, the command line is wrong and not the versions."""
    if known and cells and all(cell.bad_input for cell in cells):
        raise BadInputError("; ".join(dict.fromkeys(str(cell.reason) for cell in cells)))


@contextlib.contextmanager
def side_by_side(jobs: int, stop: Callable[[], None]) -> Iterator[Callable[..., Future[Any]]]:
    """Threads that wait for processes; on the way out by an exception the processes are ended first."""
    pool = ThreadPoolExecutor(max_workers=jobs, thread_name_prefix="cell")
    try:
        yield pool.submit
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        stop()
        pool.shutdown(wait=True)
        raise
    pool.shutdown(wait=True)


def as_they_end(futures: Iterable[Future[Any]]) -> Iterator[Future[Any]]:
    """Futures as they complete; Ctrl-C interrupts the wait."""
    left = set(futures)
    while left:
        ended, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
        yield from ended
