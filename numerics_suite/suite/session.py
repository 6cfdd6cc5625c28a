"""One process's share of a run: it holds the cell at hand and answers questions about it."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any

from numerics_suite.baselines.records import CellBaseline
from numerics_suite.checks._laws import NO_GRADIENTS, TRUE_ONLY, UNSUPPORTED
from numerics_suite.checks._true_gradient import after_reading
from numerics_suite.core import interrupts, progress
from numerics_suite.core.activity import doing
from numerics_suite.core.atomic import write_atomic
from numerics_suite.core.errors import NotApplicableError, NumericsSuiteError, UnsupportedError
from numerics_suite.core.lifeline import known, lifeline
from numerics_suite.core.records import Batch, Cell, CheckResult, Finding, Subject
from numerics_suite.core.registry import CheckSpec, get_check
from numerics_suite.devices import memory
from numerics_suite.devices.kinds import CPU
from numerics_suite.diagnosis.consequences import RAISES, raised
from numerics_suite.diagnosis.experiments import with_confidence
from numerics_suite.diagnosis.findings import finding
from numerics_suite.diagnosis.model_exceptions import model_raises
from numerics_suite.diagnosis.remedy_trials import CheckAnswer, answer_of, try_remedies
from numerics_suite.diagnosis.reproducer import reproducer
from numerics_suite.diagnosis.roots import following
from numerics_suite.diagnosis.versions_advice import PIN, borne_out, clean_on_a_fixture, without_pin
from numerics_suite.engine.cell_context import CellContext, Request
from numerics_suite.engine.scope import choose_scope
from numerics_suite.engine.training_loop import TRAJECTORY, TrainingPlan
from numerics_suite.engine.true_passes import TruePasses
from numerics_suite.inputs.data_file import Sample
from numerics_suite.inputs.vocabulary import InputSpace
from numerics_suite.judgement.known_faults import reason_to_accept
from numerics_suite.judgement.verdicts import with_limits
from numerics_suite.reports.results import check_from_json
from numerics_suite.settings.accept import matches
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.data import batch_of, sample_of
from numerics_suite.suite.driver import Outcome, ask
from numerics_suite.suite.effort import effort_of
from numerics_suite.suite.endings import TIME_LIMIT
from numerics_suite.suite.planning import Question, SuitePlan, applicable_checks, make_plan

REPRODUCERS = Path(".numerics/reproducers")
"""Where the scripts that show a finding alone are written by default, below the folder that the command runs in."""


class SuiteSession:
    """Plan and answers of one process.

    Attributes:
        settings: as used.
        tries_remedies: with `--diagnose`, remedies are tried on copies; a table of many defects does without.
        deadline: seconds since the epoch after which no new cell is begun, None without `--max-time`.
        reproducers: folder of the scripts that show a finding alone.
        answered: entries of `checks` of an earlier run that are taken over, by id; with `--resume`.
        lost: the cell in which the device failed for good, and how; no cell can run in this process after it.
    """

    def __init__(self, settings: Settings, deadline: float | None = None, reproducers: Path = REPRODUCERS) -> None:
        """Nothing is resolved until the plan is asked for."""
        self.settings = settings
        self.tries_remedies = True
        self._reproducers: dict[tuple[str, ...], str | None] = {}
        self.deadline, self.reproducers = deadline, reproducers
        self._context: CellContext | None = None
        self._true_passes = TruePasses()
        self.lost: tuple[Cell, str] | None = None
        self.answered: Mapping[str, Mapping[str, Any]] = {}
        self._raises: set[tuple[str, ...]] = set()
        self._roots: list[CheckResult] = []

    @cached_property
    def plan(self) -> SuitePlan:
        """Which check runs on which cell."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in `answer`
            return make_plan(self.settings)

    def context(self, cell: Cell) -> CellContext:
        """The context of the cell; the previous cell's is released first."""
        if self._context is None or self._context.cell != cell:
            if self._context is not None:
                previous = self._context.cell.device
                self._context.release()
                self._context = None
                memory.release(previous)
            subject = self.plan.subjects[cell.subject]
            # To learn whether two cells share passes costs a digest of all weights and a short pass: not where there is one.
            shares = sum(other.subject == cell.subject for other in self.plan.cells) > 1
            shared = self._true_passes if shares else None
            self._context = CellContext(subject, cell, self._request(subject, cell), shared=shared)
        return self._context

    def _request(self, subject: Subject, cell: Cell) -> Request:
        settings = self.settings
        scope = settings.train_scope
        if scope == "auto":
            scope = choose_scope(
                subject, cell.precision, cell.device, rows=settings.batch_size, length=settings.seq_len
            )
        plan = TrainingPlan(
            steps=settings.steps,
            optimizer=settings.optimizer,
            lr=settings.lr,
            max_grad_norm=settings.max_grad_norm,
            scope=scope,
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
        if (earlier := known().answers.get(question.id, self.answered.get(question.id))) is not None:
            answered = check_from_json(earlier)
            self._remember(answered)
            return answered
        skip = question.skip or (TIME_LIMIT if self._out_of_time(question.cell) else None)
        if skip is not None:
            return result("skipped", reason=skip)
        how = question.error or known().lost.get(question.cell.id)
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
        except NumericsSuiteError as error:
            raised = self._raised(question, error, result)
            unusable = self.context(question.cell).unusable is error
            return raised or result("error", reason=str(error), bad_input=unusable), ""
        except Exception as error:  # noqa: BLE001 - one check's failure never hides the others
            raised = self._raised(question, error, result)
            if raised is not None:
                return raised, ""
            reason = error_line(error, question.cell.device)
            if memory.is_device_lost(error):
                self.lost = question.cell, f"the device was lost in {question.check}/{question.cell.id}: {reason}"
            return result("error", reason=reason), traceback.format_exc()
        except BaseException as error:
            # `sys.exit` of the code under test, pytest's outcomes that another plugin raises inside it (a timeout, a skip),
            # and a KeyboardInterrupt that nobody sent: each stops this question and says nothing about the model.
            interrupts.stop_if_requested()
            if isinstance(error, GeneratorExit):
                raise
            return result("error", reason=stopped_line(error)), ""
        finally:
            progress.end()
            self._drop_unread(question)

    def _drop_unread(self, question: Question) -> None:
        """Let go what the check just asked was the last one of its cell to read."""
        read = get_check(question.check).reads
        if not read or self._context is None:
            return
        checks = [other.check for other in self.plan.questions if other.cell == question.cell]
        later = checks[checks.index(question.check) + 1 :]
        still_read = frozenset().union(*(get_check(check).reads for check in later))
        for name in read:
            after_reading(self._context, name, last=name not in still_read)

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
        found = finding(outcome.breaches, context, outcome.batch, diagnose=self.settings.diagnose)
        found = self._diagnosed(question, found, context)
        if self.settings.diagnose and self.tries_remedies:
            found = replace(found, reproducer=self._reproducer(question, found, context, outcome.batch))
        return self._failed(found, result, told)

    def _part_trained(self, spec: CheckSpec, context: CellContext) -> str | None:
        """Which parameters were trained, where a check reads a training run for which memory was too small to train all."""
        scope = context.request.plan.scope
        if TRAJECTORY not in spec.reads or self.settings.train_scope != "auto" or scope == "full":
            return None
        return f"--train-scope auto: {scope} was trained, since all parameters do not fit in memory"

    def _diagnosed(self, question: Question, found: Finding, context: CellContext) -> Finding:
        """The finding with its experiment made and its remedies tried, where that is wanted."""
        found = borne_out(found, context)
        if not (self.settings.diagnose and self.tries_remedies):
            return found
        pinned = any(remedy.name == PIN for remedy in found.remedies)
        if pinned and clean_on_a_fixture(question.check, context, self._ask_again):
            found = without_pin(found)
        found = with_confidence(question.check, found, context, self._ask_again)
        found = replace(found, remedies=try_remedies(question.check, found, context, self._ask_again))
        return self._following(question, found, context) or found

    def _following(self, question: Question, found: Finding, context: CellContext) -> Finding | None:
        """The finding as a consequence of an earlier one of its cell, None where nothing shows that."""
        if not (self.settings.diagnose and self.tries_remedies):
            return None
        earlier = [root for root in self._roots if root.cell == question.cell]
        return following(question.check, found, context, earlier, self._ask_again)

    def _failed(self, found: Finding, result: Callable[..., CheckResult], told: Mapping[str, object]) -> CheckResult:
        failed = result("failed", finding=found, **told)
        self._remember(failed)
        accepted = next((entry for entry in self.settings.accept if self._accepts(entry, failed)), None)
        reason = _known_reason(failed.check, found) if accepted is None else accepted.reason
        return failed if reason is None else result("accepted", finding=found, reason=reason, **told)

    def _raised(self, question: Question, error: Exception, result: Callable[..., CheckResult]) -> CheckResult | None:
        """A failure of the check where the model's own code raised; None where that is an error of something else."""
        context = self.context(question.cell)
        try:
            found = model_raises(error, context)
        except Exception:  # noqa: BLE001 - what cannot be diagnosed is the error that it was
            return None
        if found is None:
            return None
        cell = question.cell
        key = (cell.subject, cell.task, *raised(found))
        if key not in self._raises:
            found = self._diagnosed(question, found, context)
        else:  # the same exception at the same line: what cures the root is told there
            found = replace(found, remedies=())
            if (cell.id, *key) not in self._raises:
                found = self._following(question, found, context) or found
        return self._failed(found, result, {})

    def _remember(self, answered: CheckResult) -> None:
        """Let later findings of the cell be told as consequences of this one, which an earlier process may have found."""
        found, cell = answered.finding, answered.cell
        if found is None:
            return
        if found.consequence_of is None:
            self._roots.append(answered)
        if found.cause == RAISES:
            # The same exception in another cell, or at another check, is told without its remedies.
            key = (cell.subject, cell.task, *raised(found))
            self._raises |= {key, (cell.id, *key)}

    def _reproducer(self, question: Question, found: Finding, context: CellContext, batch: Batch | None) -> str | None:
        """Path of a script that shows the finding alone; one for all attentions of a precision."""
        cell = question.cell
        key = (question.check, cell.subject, cell.precision, found.cause)
        if key not in self._reproducers:
            with doing(f"{question.check}/{question.cell.id}: writing a script that shows it"):
                text = reproducer(question.check, found, context, batch)
            path = self.reproducers / self._script_name(key)
            try:
                if text is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomic(path, text, "reproducer")
            except (OSError, NumericsSuiteError):
                text = None  # a folder that cannot be written to hides no finding
            self._reproducers[key] = None if text is None else path.as_posix()
        return self._reproducers[key]

    def _script_name(self, key: tuple[str, ...]) -> str:
        """A name of its own for each cause: another attention may fail the same check for another reason.

        Args:
            key: check, subject, precision and cause.
        """
        *cell, _ = key
        first = not any(list(other[:-1]) == cell for other in self._reproducers)
        return f"{'-'.join(cell if first else key)}.py"

    def _ask_again(self, check: str, cured: CellContext) -> CheckAnswer:
        """A check of a cured copy, with the batches that this run draws."""
        outcome = ask(get_check(check), cured, seed=self.settings.seed)
        return answer_of(outcome.breaches, outcome.worst)

    @staticmethod
    def _accepts(entry: object, failed: CheckResult) -> bool:
        import transformers

        today = datetime.now(tz=timezone.utc).date()
        return matches(entry, failed, transformers.__version__, today)  # type: ignore[arg-type]


def _known_reason(check: str, found: Finding) -> str | None:
    import transformers

    return reason_to_accept(check, found, transformers.__version__)


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
    """One line for what ended a check from inside, though it is no error.

    Args:
        error: a BaseException that is no Exception.
    """
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        return f"the code under test called sys.exit({error.code!r})"
    return f"stopped before it had an answer: {type(error).__name__}{f': {text}' if text else ''}"


def error_line(error: Exception, device: str = CPU) -> str:
    """One line for an unexpected error; out of memory gives the bytes asked for and free.

    Args:
        error: what was raised.
        device: of the cell.
    """
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if memory.is_out_of_memory(error):
        return memory.out_of_memory_text(error, device)
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text}{where}"
