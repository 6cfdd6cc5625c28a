"""One process's share of a run: it holds the cell at hand and answers questions about it."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from numerics_suite.baselines.records import CellBaseline
from numerics_suite.checks._laws import NO_GRADIENTS, TRUE_ONLY, UNSUPPORTED
from numerics_suite.checks._true_gradient import GRADIENT, after_reading
from numerics_suite.core import interrupts, progress
from numerics_suite.core.errors import NotApplicableError, NumericsSuiteError, UnsupportedError
from numerics_suite.core.garbage import set_rest_aside
from numerics_suite.core.lifeline import known, lifeline
from numerics_suite.core.records import Batch, Cell, CheckResult, Finding, Subject
from numerics_suite.core.registry import CheckSpec, get_check
from numerics_suite.devices import memory
from numerics_suite.devices.kinds import CPU
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.request import Request
from numerics_suite.engine.scope import choose_scope
from numerics_suite.engine.training_loop import TRAJECTORY, TrainingPlan
from numerics_suite.engine.true_passes import TruePasses
from numerics_suite.inputs.data_file import Sample
from numerics_suite.inputs.vocabulary import InputSpace
from numerics_suite.judgement.verdicts import with_limits
from numerics_suite.reports.results import check_from_json
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.data import batch_of, sample_of
from numerics_suite.suite.driver import Outcome, ask
from numerics_suite.suite.effort import effort_of, trained_shape
from numerics_suite.suite.endings import TIME_LIMIT
from numerics_suite.suite.planning import Question, SuitePlan, applicable_checks, make_plan
from numerics_suite.suite.resume import earlier_answers
from numerics_suite.suite.run_findings import REPRODUCERS, RunFindings


class SuiteSession:
    """Plan and answers of one process.

    Attributes:
        settings: as used.
        findings: of this process, and of those whose answers it takes over.
        deadline: seconds since the epoch after which no new cell is begun, None without `--max-time`.
        reproducers: folder of the scripts that show a finding alone.
        answered: entries of `checks` of an earlier run that are taken over, by id; with `--resume`.
        earlier: answers of a process of this run that has died, and the cells in which one did.
        board: folder in which workers tell what they are at.
        lost: the cell in which the device failed for good, and how; no cell can run in this process after it.
    """

    def __init__(self, settings: Settings, *, reproducers: Path = REPRODUCERS, **handed_on: Any) -> None:
        """Nothing is resolved until the plan is asked for; `handed_on` are attributes of a session that a worker continues."""
        self.settings = settings
        self.findings = RunFindings(settings, reproducers)
        self.deadline: float | None = None
        self.reproducers = reproducers
        self.board: Path | None = None
        self._context: CellContext | None = None
        self._true_passes = TruePasses()
        self.lost: tuple[Cell, str] | None = None
        self.answered: Mapping[str, Mapping[str, Any]] = {}
        self.earlier = known()
        vars(self).update(handed_on)

    def __reduce__(self) -> tuple[Any, ...]:
        """The session for a worker, which plans nothing again; a model never travels."""
        names = ("plan", "answered", "earlier", "deadline", "reproducers", "board")
        return partial(SuiteSession, **{name: getattr(self, name) for name in names}), (self.settings,)

    def prepare(self) -> None:
        """Make the plan, take over the answers that `--resume` names, and start the time of `--max-time`.

        Raises:
            BadInputError: something that the user named cannot be used.
        """
        resume, seconds = self.settings.resume, self.settings.max_time
        self.plan  # noqa: B018 - made here for its errors
        self.answered = {} if resume is None else earlier_answers(resume, self.settings, self.plan)
        self.deadline = None if seconds is None else time.time() + seconds

    @cached_property
    def plan(self) -> SuitePlan:
        """Which check runs on which cell."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in `answer`
            return make_plan(self.settings)

    def context(self, cell: Cell) -> CellContext:
        """The context of the cell; the previous cell's is released first."""
        if self._context is None or self._context.cell != cell:
            self.release()
            subject = self.plan.subjects[cell.subject]
            # To learn whether two cells share passes costs a digest of all weights and a short pass: not where there is one.
            shares = sum(other.subject == cell.subject for other in self.plan.cells) > 1
            shared = self._true_passes if shares else None
            self._context = CellContext(subject, cell, self._request(subject, cell), shared=shared)
        return self._context

    def release(self) -> None:
        """Drop the cell at hand, so that its model takes no memory while something else runs."""
        if self._context is not None:
            device = self._context.cell.device
            self._context.release()
            self._context = None
            memory.release(device)
            set_rest_aside()

    def train_scope(self, cell: Cell) -> str:
        """`--train-scope` of a cell, chosen by its memory where that is `auto`."""
        settings, subject = self.settings, self.plan.subjects[cell.subject]
        if settings.train_scope != "auto":
            return settings.train_scope
        rows, length = trained_shape(settings, subject.parameters or 0)
        return choose_scope(subject, cell.precision, cell.device, rows=rows, length=length)

    def _request(self, subject: Subject, cell: Cell) -> Request:
        settings = self.settings
        plan = TrainingPlan(
            steps=settings.steps,
            optimizer=settings.optimizer,
            lr=settings.lr,
            max_grad_norm=settings.max_grad_norm,
            scope=self.train_scope(cell),
        )
        return Request(
            seed=settings.seed,
            rows=settings.batch_size,
            length=settings.seq_len,
            effort=effort_of(settings),
            plan=plan,
            data=self._data if settings.data is not None else None,
            baseline=self._baseline(cell),
            applicable=applicable_checks(subject, cell.precision),
        )

    def _baseline(self, cell: Cell) -> CellBaseline | None:
        baselines = self.plan.baselines
        return baselines[cell] if baselines is not None and cell in baselines else None

    @cached_property
    def _sample(self) -> Sample:
        return sample_of(self.settings)

    def _data(self, subject: Subject, space: InputSpace, tokenizer: Any) -> Batch:
        return batch_of(self._sample, subject, space, tokenizer)

    def answer(self, question: Question) -> tuple[CheckResult, str]:
        """The result of one question, and the traceback of an error (empty elsewhere)."""
        start = time.perf_counter()

        def result(status: str, **fields: object) -> CheckResult:
            return CheckResult(
                check=question.check,
                cell=question.cell,
                status=status,  # type: ignore[arg-type]
                duration_s=round(time.perf_counter() - start, 6),
                **fields,  # type: ignore[arg-type]
            )

        interrupts.stop_if_requested()
        settled = self._settled(question, result)
        if settled is not None:
            return settled, ""
        with warnings.catch_warnings():
            # A host project's `filterwarnings = error` is about its own code; torch and the models warn as they do anywhere.
            warnings.simplefilter("ignore")
            return self._asked(question, result)

    def _settled(self, question: Question, result: Callable[..., CheckResult]) -> CheckResult | None:
        """The result of a question that needs no run of the model, None of any other."""
        if (earlier := self.earlier.answers.get(question.id, self.answered.get(question.id))) is not None:
            answered = check_from_json(earlier)
            self.findings.remember(answered)
            return answered
        skip = question.skip or (TIME_LIMIT if self._out_of_time(question.cell) else None)
        if skip is not None:
            return result("skipped", reason=skip)
        how = question.error or self.earlier.lost.get(question.cell.id)
        if how is None and self.lost is not None:
            how = f"not run: {self.lost[1]}"
        return None if how is None else result("error", reason=how)

    def _asked(self, question: Question, result: Callable[..., CheckResult]) -> tuple[CheckResult, str]:
        watched = lifeline()
        if watched is not None:
            watched.asking(question.cell.id, question.check)
        progress.begin(question.check, question.cell.id)
        try:
            return self._judged(question, result), ""
        except (NotApplicableError, UnsupportedError) as error:
            return result("skipped", reason=str(error)), ""
        except Exception as error:  # noqa: BLE001 - one check's failure never hides the others
            context = self.context(question.cell)
            if (found := self.findings.of_exception(question.check, error, context)) is not None:
                return self._failed(found, result), ""
            if isinstance(error, NumericsSuiteError):
                return result("error", reason=str(error), bad_input=context.unusable is error), ""
            reason = error_line(error, question.cell.device)
            if memory.is_device_lost(error):
                self.lost = question.cell, f"the device was lost in {question.check}/{question.cell.id}: {reason}"
            return result("error", reason=reason), traceback.format_exc()
        except BaseException as error:
            # `sys.exit` of the code under test, pytest's outcomes that another plugin raises inside it (a timeout, a skip),
            # and a KeyboardInterrupt without a signal: each stops this question and is no fact about the model.
            interrupts.stop_if_requested()
            if isinstance(error, GeneratorExit):
                raise
            return result("error", reason=stopped_line(error)), ""
        finally:
            progress.end()
            self._drop_unread(question)

    def _drop_unread(self, question: Question) -> None:
        """Drop what no later check of the cell reads; a small model's results stay."""
        context = self._context
        if context is None or not context.holds_large_model or GRADIENT not in get_check(question.check).reads:
            return
        cell, questions = question.cell, self.plan.questions
        later = [other for other in questions[questions.index(question) + 1 :] if not other.skip and not other.error]
        reading = [other.cell for other in later if GRADIENT in get_check(other.check).reads]
        of_subject = any((other.subject, other.task) == (cell.subject, cell.task) for other in reading)
        after_reading(context, last=cell not in reading, last_of_all=not of_subject)

    def _out_of_time(self, cell: Cell) -> bool:
        begun = self._context is not None and self._context.cell == cell
        return not begun and self.deadline is not None and time.time() > self.deadline

    def _judged(self, question: Question, result: Callable[..., CheckResult]) -> CheckResult:
        spec = get_check(question.check)
        context = self.context(question.cell)
        outcome = ask(spec, context, seed=self.settings.seed)
        told = {
            "measurements": _numbers(outcome),
            "series": tuple(with_limits(question.check, series) for series in outcome.series.values()),
        }
        if not outcome.breaches:
            unsupported = _fact(outcome, UNSUPPORTED)
            if unsupported is not None:
                return result("skipped", reason=unsupported)
            return result("passed", reason=_half_judged(outcome) or self._part_trained(spec, context), **told)
        failed = self._failed(self.findings.of_breaches(question.check, outcome, context), result, **told)
        if context.holds_large_model:
            memory.release(question.cell.device)  # what remedies and experiments leave in cycles
        return failed

    def _part_trained(self, spec: CheckSpec, context: CellContext) -> str | None:
        """Which parameters were trained, where a check reads a training run for which memory was too small to train all."""
        scope = context.request.plan.scope
        if TRAJECTORY not in spec.reads or self.settings.train_scope != "auto" or scope == "full":
            return None
        return f"--train-scope auto: {scope} was trained, since all parameters do not fit in memory"

    def _failed(self, found: Finding, result: Callable[..., CheckResult], **told: object) -> CheckResult:
        failed = result("failed", finding=found, **told)
        self.findings.remember(failed)
        reason = self.findings.reason_to_accept(failed)
        return failed if reason is None else result("accepted", finding=found, reason=reason, **told)


def _numbers(outcome: Outcome) -> dict[str, float]:
    numbers = {name: measurement.value for name, measurement in outcome.worst.items()}
    numbers["examples"] = outcome.examples
    return numbers


def _half_judged(outcome: Outcome) -> str | None:
    """What was not judged and why: a law in the precision, naming the op, or gradients; None where all was."""
    found = ((name, _fact(outcome, name)) for name in (TRUE_ONLY, NO_GRADIENTS))
    return next((f"{name}: {reason}" for name, reason in found if reason is not None), None)


def _fact(outcome: Outcome, name: str) -> str | None:
    """The fact of that name that a measurement has, None where none has it."""
    held = (measurement.facts.get(name) for measurement in outcome.worst.values())
    return next((str(value) for value in held if value), None)


def stopped_line(error: BaseException) -> str:
    """One line for what ended a check from inside, though it is no error."""
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        return f"the code under test called sys.exit({error.code!r})"
    return f"stopped before it had an answer: {type(error).__name__}{f': {text}' if text else ''}"


def error_line(error: Exception, device: str = CPU) -> str:
    """One line for an unexpected error; out of memory gives the bytes asked for and free."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if memory.is_out_of_memory(error):
        return memory.out_of_memory_text(error, device)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}"
