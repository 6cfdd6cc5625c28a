"""The gathering end of a run: it receives every answer, sees that none is missing, and gives the verdict."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import pytest

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.records import CheckResult, RunResult, Subject, SubjectFacts
from numerics_suite.diagnosing.consequences import as_tree
from numerics_suite.diagnosing.versions_advice import without_newer
from numerics_suite.engine.environment import describe_run
from numerics_suite.reporting.results import check_from_json, write_results
from numerics_suite.settings.accept import matches, reaches, stale
from numerics_suite.settings.tree import Settings, to_json
from numerics_suite.suite.held_to import GROUP, left_out
from numerics_suite.suite.planning import Question
from numerics_suite.suite.session import TIME_LIMIT, SuiteSession

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numerics_suite.suite.planning import SuitePlan

MISSING = "planned, and no answer came: the worker ended, or the test was stopped"


class Audience(Protocol):
    """Who follows the run while it goes on.

    Attributes:
        asks_index: it asks an index of releases afterwards, and tries newer ones.
    """

    asks_index: bool

    def begin(self, plan: SuitePlan, environment: Mapping[str, Any]) -> None:
        """The plan is made."""

    def progress(self, done: int, total: int, result: CheckResult) -> None:
        """One more answer is there."""


class Gate:
    """Receives answers, from this process or from workers.

    Attributes:
        run: the command that drives this run, None under plain pytest.
        result: the whole run, once finished.
        failed_items: items of the suite that pytest counts as failed.
    """

    def __init__(self, suite: SuiteSession, run: Audience | None) -> None:
        """Begin with the whole plan as what is expected."""
        self.suite, self.run = suite, run
        self.settings: Settings = suite.settings
        self.expected: dict[str, Question] = {_id(question): question for question in suite.plan.questions}
        self.answers: dict[str, CheckResult] = {}
        self.failed_items = 0
        self._giving_up: set[object] = set()
        self.result: RunResult | None = None
        self.started = datetime.now(tz=timezone.utc).astimezone()
        self._clock = time.perf_counter()
        if run is not None:
            run.begin(suite.plan, describe_run(suite.plan.device))

    def select(self, questions: Sequence[Question]) -> None:
        """Expect only what `-k`, `-m` and the like left."""
        if questions or self.run is None:
            self.expected = {_id(question): question for question in questions}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take the answer out of pytest's report."""
        written = getattr(report, "numerics_result", None)
        if written is None:
            return
        result = check_from_json(written)
        self.answers[result.id] = result
        if getattr(report, "numerics_gives_up", False):
            self._giving_up.add(getattr(report, "node", None))
        self.failed_items += int(report.failed)
        if self.run is not None:
            self.run.progress(len(self.answers), len(self.expected), result)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport, sched: Any) -> None:
        """A worker has ended: the remaining cells run in a new one.

        Where it ended because its device was lost, it had not begun the test that xdist takes it to have died in. Where it
        died, that test's cell is not run again: what it has no answer for is an error. So neither is a failure of its own.
        """
        give_up = getattr(sched, "give_up", None)
        if give_up is None:
            return
        if getattr(report, "node", None) not in self._giving_up:
            give_up(crashitem)
        report.outcome = "skipped"

    def finish(self, pytest_status: int, *, others_failed: bool) -> int:
        """Put the run together and give the exit status.

        Args:
            pytest_status: what pytest would have ended with.
            others_failed: tests that are not the suite's failed too.
        """
        interrupted = pytest_status in {2, 4} and not others_failed
        results = self._in_order(interrupted=interrupted)
        notes, broken = self._notes(results)
        status = exit_status(results, partial=self._partial(results), broken=bool(broken))
        if interrupted or (not self.expected and self.run is None):
            status = pytest_status  # `-k` and `-m` left none of the suite: then the other tests decide
        elif others_failed and status in {0, 3, 5}:
            status = 1
        failing = any(result.status == "failed" for result in results) or bool(broken)
        erring = any(result.status == "error" for result in results)
        verdict: Literal["pass", "fail", "error"] = "fail" if failing else ("error" if erring else "pass")
        self.result = RunResult(
            command="check",
            started_at=self.started.isoformat(timespec="seconds"),
            duration_s=round(time.perf_counter() - self._clock, 3),
            verdict=verdict,
            environment=describe_run(self.suite.plan.device),
            settings=self._settings_as_used(),
            subjects=tuple(subject_facts(subject) for subject in self.suite.plan.subjects.values()),
            checks=tuple(results),
            notes=(*notes, *broken),
            exit_status=status,
        )
        if self.run is None:
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
            from numerics_suite.reporting.documents import Documents, Run
            from numerics_suite.reporting.report import write_wanted

            documents = Documents(runs=(Run(label=result.command, result=result),))
            write_wanted(documents, settings.report, settings.junitxml, "--numerics-")

    def _in_order(self, *, interrupted: bool) -> list[CheckResult]:
        """Answers in the order of the plan; what was planned and has none is an error, unless the user stopped."""
        results = []
        for key, question in self.expected.items():
            if key in self.answers:
                results.append(self.answers[key])
            elif not interrupted:
                results.append(CheckResult(check=question.check, cell=question.cell, status="error", reason=MISSING))
        if not getattr(self.run, "asks_index", False):
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

    def _settings_as_used(self) -> dict[str, Any]:
        """Every option, with what `auto` and the device's default became."""
        plan = self.suite.plan
        used = {"device": plan.device, "precision": list(dict.fromkeys(cell.precision for cell in plan.cells))}
        return {**to_json(self.settings), **used}

    def _partial(self, results: Sequence[CheckResult]) -> bool:
        limited = any(result.status == "skipped" and result.reason == TIME_LIMIT for result in results)
        return limited and not self.settings.allow_partial

    def _notes(self, results: Sequence[CheckResult]) -> tuple[list[str], list[str]]:
        import transformers

        notes = [f"--data: {self.suite.plan.data}"] if self.suite.plan.data else []
        limited = sum(result.status == "skipped" and result.reason == TIME_LIMIT for result in results)
        if limited:
            notes.append(f"--max-time: {limited} checks were not begun")
        halves = Counter(result.reason for result in results if result.status == "passed" and result.reason)
        notes += [f"{count} {'law' if count == 1 else 'laws'} {reason}" for reason, count in halves.items()]
        today = datetime.now(tz=timezone.utc).date()
        informing, missing = self._left_out()
        broken = [*stale(self.settings.accept, results, today, transformers.__version__), *missing]
        return [*notes, *informing], broken

    def _left_out(self) -> tuple[list[str], list[str]]:
        """What the baselines hold that this run did not cover, where it was to be held to them at all."""
        plan = self.suite.plan
        if plan.baselines is None or not any(question.group == GROUP for question in self.expected.values()):
            return [], []
        return left_out(self.settings, plan.baselines, plan.cells)

    def print_summary(self, reporter: Any) -> None:
        """Under plain pytest, the blocks of the findings after pytest's own report."""
        from numerics_suite.reporting.text import summary_lines

        assert self.result is not None
        reporter.section("numerics-suite")
        for line in summary_lines(self.result):
            reporter.line(line)


def _id(question: Question) -> str:
    return f"{question.check}/{question.cell.id}"


def subject_facts(subject: Subject) -> SubjectFacts:
    """What a results file carries of a subject.

    Args:
        subject: resolved.
    """
    return SubjectFacts(**{item.name: getattr(subject, item.name) for item in fields(SubjectFacts)})


def exit_status(results: Sequence[CheckResult], *, partial: bool = False, broken: bool = False) -> int:
    """The exit status of CONTRACT.md for these results.

    Args:
        results: of every planned check.
        partial: a time limit left checks out and that is not allowed.
        broken: an accept entry matched nothing or is past its date, or a subject of the baselines was left out.
    """
    statuses = {result.status for result in results}
    if "failed" in statuses or broken:
        return 1
    if "error" in statuses:
        return 3
    if not statuses & {"passed", "accepted"} or partial:
        return 5
    return 0
