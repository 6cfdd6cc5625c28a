"""Collects the answers of a run, sees that none is missing, and gives the verdict."""

from __future__ import annotations

import pickle
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from numerics_suite.checks._laws import TRUE_ONLY
from numerics_suite.core.answer_file import AnswerFile
from numerics_suite.core.deaths import death_text, peak_of_children
from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.interrupts import requested
from numerics_suite.core.lifeline import lifeline
from numerics_suite.core.records import CheckResult, RunResult, Subject, SubjectFacts
from numerics_suite.core.tree import is_root
from numerics_suite.diagnosis.consequences import as_tree
from numerics_suite.diagnosis.versions_advice import without_newer
from numerics_suite.engine.environment import describe_run
from numerics_suite.reports.plan import about_seconds
from numerics_suite.reports.results import STATUSES, check_from_json, indented, to_json, with_checks, write_results
from numerics_suite.settings.accept import matches, reaches, stale
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.baseline_selection import GROUP, left_out
from numerics_suite.suite.endings import MISSING, TIME_LIMIT, ending
from numerics_suite.suite.planning import Question
from numerics_suite.suite.provenance import input_digests, settings_as_used
from numerics_suite.suite.session import SuiteSession
from numerics_suite.suite.stash import WORKER_SESSION

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numerics_suite.suite.run import RunContext


class Gate:
    """Receives answers, from this process or from workers.

    Attributes:
        run: the command that drives this run, None under plain pytest.
        result: the whole run, once finished.
        failed_items: items of the suite that pytest counts as failed.
    """

    def __init__(self, suite: SuiteSession, run: RunContext | None) -> None:
        """Begin with the whole plan as what is expected."""
        self.suite, self.run = suite, run
        self.settings: Settings = suite.settings
        self.expected: dict[str, Question] = {question.id: question for question in suite.plan.questions}
        self.answers: dict[str, CheckResult] = {}
        self.failed_items = 0
        self._giving_up: set[object] = set()
        self._died: dict[str, str] = {}
        self._ready: set[object] = set()
        self._missing = MISSING
        self._file = AnswerFile(self.settings.json, "--json")
        self.result: RunResult | None = None
        self.started = datetime.now(tz=timezone.utc).astimezone()
        self._clock = time.perf_counter()
        plan = suite.plan
        self._settings_as_used = settings_as_used(self.settings, plan)
        self._environment = {**describe_run(plan.device), "digests": input_digests(self.settings, plan)}
        if run is not None:
            run.begin(self._environment)
        self._written: dict[str, str] = {}
        self._statuses: dict[str, tuple[str, ...]] = {}
        for entry in {**suite.answered, **suite.earlier.answers}.values():
            self._write_down(entry)  # whatever ends this run, what an earlier one answered is in its file
        self._head = to_json(self._unfinished())
        self._offer()

    def select(self, questions: Sequence[Question]) -> None:
        """Expect only what `-k`, `-m` and the like left."""
        if questions or self.run is None:
            self.expected = {question.id: question for question in questions}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the answer out of pytest's report."""
        # A test of the suite that failed without an answer, as when another plugin stops it, is not another test's failure.
        self.failed_items += int(report.failed and getattr(report, "numerics_item", False))
        written = getattr(report, "numerics_result", None)
        if written is None:
            return
        result = self._write_down(written)
        self.answers[result.id] = result
        self._offer()
        watched = lifeline()
        if watched is not None:
            watched.answered(written)
        if getattr(report, "numerics_gives_up", False):
            self._giving_up.add(getattr(report, "node", None))
        if self.run is not None:
            self.run.progress(len(self.answers), len(self.expected), result)

    def _write_down(self, entry: Mapping[str, Any]) -> CheckResult:
        """Let an answer be in the file."""
        result = check_from_json(entry)
        self._written[result.id] = indented(entry)
        self._statuses[result.id] = (result.status, *(["findings"] if is_root(result) else []))
        return result

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Hand the session to a worker: with its plan, and with what is answered and what ended an earlier process."""
        node.workerinput[WORKER_SESSION] = pickle.dumps(self.suite)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any) -> None:
        """A worker has begun."""
        self._ready.add(node)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker is gone. Where it could not even begin, no other one will: begin none."""
        if error and node not in self._ready:
            self._missing = f"no worker could begin: it was {_worker_death(node)}"
            self._stop_workers(node)

    def _stop_workers(self, node: Any) -> None:
        controller = node.config.pluginmanager.getplugin("dsession")
        if controller is not None:
            controller.shouldstop = self._missing

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport, sched: Any) -> None:
        """A worker has ended: the remaining cells run in a new one.

        Where it ended because its device was lost, it had not begun the test that xdist takes it to have died in. Where it
        died, that test's cell is not run again: what it has no answer for is an error. So neither is a failure of its own.
        """
        give_up = getattr(sched, "give_up", None)
        if give_up is None:
            return
        node = getattr(report, "node", None)
        if node not in self._giving_up:
            question = give_up(crashitem)
            if question is not None:
                self._died[question.cell.id] = f"the worker was {_worker_death(node)}, in {question.id}"
        report.outcome = "skipped"

    def finish(self, pytest_status: int, *, others_failed: bool) -> int:
        """Put the run together and give the exit status; tests that are not the suite's may have failed too."""
        interrupted = requested()
        results = self._in_order(interrupted=interrupted)
        notes, broken = ([self._stopped(results)], []) if interrupted else self._notes(results)
        end = ending(results, interrupted=interrupted, allow_partial=self.settings.allow_partial, broken=bool(broken))
        status = end.status
        if pytest_status == pytest.ExitCode.USAGE_ERROR or (not self.expected and self.run is None):
            status = pytest_status  # `-k` and `-m` left none of the suite: then the other tests decide
        elif others_failed and status in {0, 3, 5}:
            status = 1
        self.result = replace(
            self._unfinished(),
            duration_s=round(time.perf_counter() - self._clock, 3),
            verdict=end.verdict,
            complete=end.complete,
            checks=tuple(results),
            notes=(*notes, *broken),
            exit_status=status,
        )
        self._file.close()
        if self.run is not None:
            self.run.result = self.result
            return status
        try:
            self._write(self.result)
        except (NumericsSuiteError, OSError) as error:
            raise pytest.UsageError(str(error)) from None
        return status

    def _write(self, result: RunResult) -> None:
        """Under plain pytest, the files that a command writes itself."""
        settings = self.settings
        if settings.json and settings.json != "-":
            write_results(Path(settings.json), result)
        if settings.report or settings.junitxml:
            # Here and not above: a cell of a matrix writes no report, and starts sooner without what reports need.
            from numerics_suite.reports.documents import CheckRun, Documents
            from numerics_suite.reports.report import write_wanted

            documents = Documents(runs=(CheckRun(label=result.command, result=result),))
            write_wanted(documents, settings.report, settings.junitxml, "--numerics-")

    def _in_order(self, *, interrupted: bool) -> list[CheckResult]:
        """Answers in the order of the plan; what was planned and has none is an error, unless the user stopped."""
        results = []
        for key, question in self.expected.items():
            if key in self.answers:
                results.append(self.answers[key])
            elif not interrupted:
                reason = self._died.get(question.cell.id, self._missing)
                results.append(CheckResult(check=question.check, cell=question.cell, status="error", reason=reason))
        if self.run is None or not self.run.asks_index:
            results = [
                result if result.finding is None else replace(result, finding=without_newer(result.finding))
                for result in results
            ]
        return as_tree(results, self._covers)

    def _covers(self, root: CheckResult, result: CheckResult) -> bool:
        """Whether an entry that accepts the root is for the other result's cell too."""
        import transformers

        today = datetime.now(tz=timezone.utc).date()
        accepting = (e for e in self.settings.accept if matches(e, root, transformers.__version__, today))
        return any(reaches(entry, result) for entry in accepting)

    def _stopped(self, results: Sequence[CheckResult]) -> str:
        return f"interrupted: {len(results)} of {len(self.expected)} checks have an answer"

    def _unfinished(self) -> RunResult:
        """The run without its checks, as it stands until the end."""
        return RunResult(
            command="check",
            started_at=self.started.isoformat(timespec="seconds"),
            duration_s=0.0,
            verdict="error",
            complete=False,
            environment=self._environment,
            settings=self._settings_as_used,
            subjects=tuple(subject_facts(subject) for subject in self.suite.plan.subjects.values()),
            checks=(),
            exit_status=3,
        )

    def _offer(self) -> None:
        """Let the answers so far be in the file within a second; each is turned into text once."""
        answers = tuple(self._written.values())
        totals = Counter(status for statuses in self._statuses.values() for status in statuses)
        counted = {status: totals[status] for status in (*STATUSES, "findings")}
        head = {**self._head, "duration_s": round(time.perf_counter() - self._clock, 3), "counts": counted}
        self._file.offer(lambda: with_checks(head, answers))

    def _notes(self, results: Sequence[CheckResult]) -> tuple[list[str], list[str]]:
        import transformers

        notes = [f"--data: {self.suite.plan.data}"] if self.suite.plan.data else []
        if self.settings.layers is not None:
            subjects = self.suite.plan.subjects.values()
            notes += [f"{subject.id}: {note}" for subject in subjects for note in subject.notes if "--layers" in note]
        if self.settings.resume is not None:
            reused = sum(result.id in self.suite.answered for result in results)
            notes.append(f"--resume: {reused} of {len(results)} answers are those of {self.settings.resume}")
        limited = sum(result.status == "skipped" and result.reason == TIME_LIMIT for result in results)
        if limited:
            none = limited == sum(result.id not in self.suite.answered for result in results)
            notes.append(f"--max-time: {limited} checks were not begun{self._smallest_cell() if none else ''}")
        halves = Counter(result.reason for result in results if result.status == "passed" and result.reason)
        notes += [_half_told(reason, count) for reason, count in halves.items()]
        today = datetime.now(tz=timezone.utc).date()
        informing, missing = self._left_out()
        broken = [*stale(self.settings.accept, results, today, transformers.__version__), *missing]
        return [*notes, *informing], broken

    def _smallest_cell(self) -> str:
        """For a time limit within which no cell could be begun: what would be enough for one."""
        seconds: dict[str, float] = {}
        for question, expected in (self.run.expected if self.run else {}).items():
            cell = question.partition("/")[2]
            seconds[cell] = seconds.get(cell, 0.0) + expected
        some = [one for one in seconds.values() if one]
        return f"; the smallest cell is expected to take {about_seconds(min(some))}" if some else ""

    def _left_out(self) -> tuple[list[str], list[str]]:
        """What the baselines hold that this run did not cover, where it compares with them at all."""
        plan = self.suite.plan
        if plan.baselines is None or not any(question.group == GROUP for question in self.expected.values()):
            return [], []
        return left_out(self.settings, plan.baselines, plan.cells)

    def print_summary(self, reporter: Any) -> None:
        """Under plain pytest, the blocks of the findings after pytest's own report."""
        from numerics_suite.reports.text import summary_lines

        assert self.result is not None
        reporter.section("numerics-suite")
        for line in summary_lines(self.result, verbose=reporter.verbosity > 0):
            reporter.line(line)


def subject_facts(subject: Subject) -> SubjectFacts:
    """What a results file carries of a subject."""
    return SubjectFacts(**{item.name: getattr(subject, item.name) for item in fields(SubjectFacts)})


def _worker_death(node: Any) -> str:
    """How xdist's worker ended; execnet holds its process."""
    try:
        process = node.gateway._io.popen  # noqa: SLF001 - neither xdist nor execnet tells how a process ended
        status = int(process.wait(timeout=5))
    except (AttributeError, subprocess.TimeoutExpired):
        return "gone"
    return death_text(status, peak_of_children())


def _half_told(reason: str, count: int) -> str:
    """A note about checks that passed and were judged in part."""
    if reason.startswith(TRUE_ONLY):
        return f"{count} {'law' if count == 1 else 'laws'} {reason}"
    return f"{count} {'check' if count == 1 else 'checks'}: {reason}"
