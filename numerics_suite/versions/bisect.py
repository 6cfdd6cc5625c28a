"""The first version at which the verdict changes: the ends are judged, then the deciding checks alone are asked between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from numerics_suite.core.errors import BadInputError, NumericsSuiteError
from numerics_suite.core.records import CheckResult
from numerics_suite.core.versions import BisectResult, BisectStep, StepVerdict
from numerics_suite.settings.tree import Settings
from numerics_suite.versions.candidates import Candidate
from numerics_suite.versions.cell_results import read_run
from numerics_suite.versions.fingerprints import know
from numerics_suite.versions.job import BASELINE
from numerics_suite.versions.matrix import Execute, MatrixPlan, answer, side_by_side
from numerics_suite.versions.result_store import ResultStore
from numerics_suite.versions.revisions import brought
from numerics_suite.versions.search import ItemVerdict, search

BASELINE_CHECKS = "baseline.*"
ANSWERS: dict[ItemVerdict, StepVerdict] = {
    ItemVerdict.GOOD: "good",
    ItemVerdict.BAD: "bad",
    ItemVerdict.UNTESTABLE: "untestable",
}


class BisectListener(Protocol):
    """Who follows the search."""

    def doing(self, label: str, what: str) -> None:
        """A version has come to this."""

    def undecided(self) -> None:
        """No check decides between the ends; a baseline of the good one does."""

    def step(self, step: BisectStep) -> None:
        """One more version was tried."""

    def deciding(self, checks: Sequence[str], count: int) -> None:
        """The ends hold; these checks decide between so many versions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What one version said.

    Attributes:
        results: by id; empty where it cannot run.
        reason: why it cannot run, or why nothing was asked.
        duration_s: of the process.
        reused: an earlier run's.
        folder: of its files.
    """

    results: dict[str, CheckResult]
    reason: str | None
    duration_s: float
    reused: bool
    folder: Path

    def having(self, *statuses: str) -> list[str]:
        """Ids with one of these statuses, in the order of the plan."""
        return [key for key, result in self.results.items() if result.status in statuses]


@dataclass(slots=True, kw_only=True)
class Bisection:
    """One search.

    Attributes:
        plan: of one subject; what each version is asked is made from it.
        candidates: the good end first.
        kept: entered; steps are found and kept there.
        execute: how a job is run.
        audience: follows every step.
        jobs: how many run at once; the two ends can.
        stop: ends what runs.
        named: the user said which check decides.
        tested: what was told so far.
        heard: what each label said.
        recorded: a baseline of the good end decides.
    """

    plan: MatrixPlan
    candidates: Sequence[Candidate]
    kept: ResultStore
    execute: Execute
    audience: BisectListener
    jobs: int
    stop: Callable[[], None]
    named: bool
    tested: list[BisectStep] = field(default_factory=list)
    heard: dict[str, Heard] = field(default_factory=dict)
    recorded: bool = False

    @property
    def good(self) -> Candidate:
        """The good end."""
        return self.candidates[0]

    @property
    def bad(self) -> Candidate:
        """The bad end."""
        return self.candidates[-1]

    def find(self, what: str, show: Callable[[Candidate, Candidate, Settings], str]) -> BisectResult:
        """Search.

        Args:
            what: `transformers`, `torch`, `checkpoint`, or the folder of a clone.
            show: the command that shows a boundary: of the last good, the first bad, and the settings of the deciding checks.

        Raises:
            BadInputError: an end does not hold, or no environment can be made here.
            KeyboardInterrupt: the user stopped; what is done is kept.
        """
        begun = time.perf_counter()
        settings, deciding = self._ends()
        self.audience.deciding(deciding, len(self.candidates))
        names = tuple(dict.fromkeys(key.partition("/")[0] for key in deciding))
        settings = replace(settings.stating(checks=names), skip=())
        boundary = search(self.candidates, lambda candidate: self._judge(candidate, settings, deciding))
        first = self.heard[boundary.first_bad.label]
        result = first.results[next(key for key in deciding if first.results.get(key, _NONE).status == "failed")]
        return BisectResult(
            what=what,
            subject=result.cell.subject,
            last_good=boundary.last_good.label,
            first_bad=boundary.first_bad.label,
            between=tuple(candidate.label for candidate in boundary.between),
            tested=tuple(self.tested),
            check=result.check,
            deciding=tuple(deciding),
            finding=result.finding,
            results=first.folder / "results.json",
            show=show(boundary.last_good, boundary.first_bad, replace(settings, checks=(result.check,))),
            candidates=len(self.candidates),
            duration_s=round(time.perf_counter() - begun, 3),
        )

    # --- ends ----------------------------------------------------------------------------------------------------------

    def _ends(self) -> tuple[Settings, list[str]]:
        """The settings of every step, and the ids that fail at the bad end and pass at the good one."""
        settings = self.plan.settings
        wants_baseline = self.named and any(check.startswith("baseline.") for check in settings.checks)
        if wants_baseline and settings.baseline is None:
            return self._against_the_good_end(settings)
        bad, good = self._both(settings)
        deciding = _deciding(good, bad)
        if not deciding and not self.named and settings.baseline is None:
            self.audience.undecided()
            self.heard.clear()
            return self._against_the_good_end(settings.stating(checks=(BASELINE_CHECKS,)))
        if not deciding:
            raise BadInputError(self._why_not(good, bad))
        self._tell_ends(good, bad)
        return settings, deciding

    def _against_the_good_end(self, settings: Settings) -> tuple[Settings, list[str]]:
        """The same, with a baseline that is recorded at the good end."""
        recorded = self._hear(self.good, settings, record=True)
        folder = recorded.folder / BASELINE
        if recorded.reason is not None or not folder.is_dir():
            message = f"the good end {self.good.label} gives no baseline: {recorded.reason}"
            raise BadInputError(message)
        self.recorded = True
        settings = settings.stating(baseline=folder)
        bad, good = self._both(settings)
        deciding = _deciding(good, bad)
        if not deciding:
            raise BadInputError(self._why_not(good, bad))
        self._tell_ends(good, bad)
        return settings, deciding

    def _both(self, settings: Settings) -> tuple[Heard, Heard]:
        """What the bad end and the good end say; at once where two jobs may run."""
        with side_by_side(min(self.jobs, 2), self.stop) as submit:
            futures = [submit(self._hear, end, settings) for end in (self.bad, self.good)]
            bad, good = (future.result() for future in futures)
        for end, candidate, heard in (("bad", self.bad, bad), ("good", self.good, good)):
            if heard.reason is not None:
                message = f"the {end} end {candidate.label} cannot be tried: {heard.reason}"
                raise BadInputError(message)
        return bad, good

    def _why_not(self, good: Heard, bad: Heard) -> str:
        failing = [key for key in bad.having("failed") if good.results.get(key, _NONE).status == "failed"]
        if failing:
            finding = bad.results[failing[0]].finding
            cause = f" ({finding.cause})" if finding else ""
            return (
                f"the good end {self.good.label} does not hold: {failing[0]}{cause} fails there too; "
                "give a --good that passes"
            )
        alone = bad.having("failed")
        if alone:
            status = good.results[alone[0]].status if alone[0] in good.results else "not asked"
            return f"the good end {self.good.label} does not hold: {alone[0]} is {status} there"
        passed = len(bad.having("passed", "accepted"))
        held = f", nor does it differ from a baseline of {self.good.label}" if self.recorded else ""
        told = "1 check passed" if passed == 1 else f"{passed} checks passed"
        return f"the bad end {self.bad.label} does not hold: nothing fails there{held} ({told})"

    def _tell_ends(self, good: Heard, bad: Heard) -> None:
        for candidate, heard, verdict in ((self.bad, bad, ItemVerdict.BAD), (self.good, good, ItemVerdict.GOOD)):
            self._tell(candidate, heard, verdict)
            self.heard[candidate.label] = heard

    # --- one version ---------------------------------------------------------------------------------------------------

    def _judge(self, candidate: Candidate, settings: Settings, deciding: Sequence[str]) -> ItemVerdict:
        known = self.heard.get(candidate.label)
        heard = known or self._hear(candidate, settings)
        self.heard[candidate.label] = heard
        given, reason = _judged(heard, deciding)
        if known is None:
            self._tell(candidate, replace(heard, reason=reason), given)
        return given

    def _tell(self, candidate: Candidate, heard: Heard, given: ItemVerdict) -> None:
        step = BisectStep(
            version=candidate.label,
            verdict=ANSWERS[given],
            duration_s=heard.duration_s,
            reason=heard.reason if given is ItemVerdict.UNTESTABLE else None,
            reused=heard.reused,
        )
        self.tested.append(step)
        self.audience.step(step)

    def _hear(self, candidate: Candidate, settings: Settings, *, record: bool = False) -> Heard:
        """Ask one version; with `record` for a baseline instead of checks."""
        with brought(candidate):
            if candidate.subject is not None:
                settings = replace(settings, subjects=(candidate.subject,))
            names = (self.plan.known[0].name,)
            settings = settings.stating(names=names)
            if record:  # whichever check decides, the baseline is the same
                origins = {name: origin for name, origin in settings.origins.items() if name not in {"checks", "skip"}}
                settings = replace(settings, checks=(), skip=(), origins=origins)
            known = know(settings.subjects[0], names[0], allow_pickle=settings.allow_pickle)
            plan = replace(self.plan, settings=settings, known=(known,), check=not record, record=record)
            try:
                job = plan.job(candidate.wanted)
            except BadInputError:
                raise
            except NumericsSuiteError as error:
                return Heard(results={}, reason=str(error), duration_s=0.0, reused=False, folder=self.kept.folder)
            done, folder, reused = answer(
                job, self.kept, self.execute, lambda told: self.audience.doing(candidate.label, told)
            )
        results = {result.id: result for result in read_run(folder).checks} if done["results"] else {}
        broken = done["reason"] if done["status"] in {"error", "unsupported"} and not results else None
        if record and not done["baseline"]:
            broken = done["reason"]
        seconds = 0.0 if reused else done.get("duration_s", 0.0)
        return Heard(results=results, reason=broken, duration_s=seconds, reused=reused, folder=folder)


_NONE = CheckResult(check="", cell=None, status="skipped")  # type: ignore[arg-type]


def _deciding(good: Heard, bad: Heard) -> list[str]:
    passing = set(good.having("passed", "accepted"))
    return [key for key in bad.having("failed") if key in passing]


def _judged(heard: Heard, deciding: Sequence[str]) -> tuple[ItemVerdict, str | None]:
    """A version is bad where a deciding check fails, good where all that were asked pass, else untestable."""
    if heard.reason is not None:
        return ItemVerdict.UNTESTABLE, heard.reason
    asked = [heard.results[key] for key in deciding if key in heard.results]
    if any(result.status == "failed" for result in asked):
        return ItemVerdict.BAD, None
    wrong = next((result for result in asked if result.status == "error"), None)
    if wrong is None and any(result.status in {"passed", "accepted"} for result in asked):
        return ItemVerdict.GOOD, None
    told = wrong or next(iter(asked), None)
    return ItemVerdict.UNTESTABLE, (told.reason if told is not None else "the deciding checks were not asked")
