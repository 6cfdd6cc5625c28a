"""Trying remedies: each is applied to a fresh copy, the failing check runs again, and the effect says what was seen.

`verified` is True where the check itself passes on the cured copy, together with what shows that nothing was merely hidden: the
weights are sound, the answers repeat and are those of the family's definition, and a cell that can train trains. What fails for
another reason, as it did without the remedy or could not be asked without it, does not count: what the cell has wrong beside the
finding is cured first (:mod:`numerics_suite.diagnosis.other_defects`). It is False where that was tried and
is not so, None where it could not be tried here. Where none helps alone, combinations are tried, smallest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from numerics_suite.core.activity import doing
from numerics_suite.core.errors import NotApplicableError, NumericsSuiteError, UnsupportedError
from numerics_suite.core.records import Fact, Finding, Measurement, Remedy
from numerics_suite.core.registry import get_check
from numerics_suite.diagnosis.consequences import NO_RUN, RAISES
from numerics_suite.diagnosis.copies import discard
from numerics_suite.diagnosis.findings import finding as finding_of
from numerics_suite.diagnosis.findings import title
from numerics_suite.diagnosis.learning_rates import learning_rates
from numerics_suite.diagnosis.other_defects import without_others
from numerics_suite.diagnosis.remedies import Attempt
from numerics_suite.diagnosis.remedy_combinations import Shown, combined
from numerics_suite.diagnosis.remedy_effects import OF_TRAINING, STARTS_TRAINING, before_and_after, curve, opened
from numerics_suite.diagnosis.remedy_register import cost_of, cures, description_of, useful_first
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.training_loop import TrainingPlan
from numerics_suite.judgement.verdicts import Breach, judge

SOUND = ("load.finite", "load.head-init")
"""Asked of every cured copy: a remedy under which one still fails hides the symptom and leaves the cause."""

TRAINS = ("train.finite", "train.descends")
"""Asked where the finding is about training or about the weights that training starts from."""

NOT_HERE = {
    "reload-weights": "cannot be tried: there is no other copy of the files here and nothing is fetched; "
    "run the same check on the files once they are fetched again",
    "newer-version": "not tried yet: add --try-versions, which tries other releases in environments of their own",
    "pin-version": "not tried yet: add --try-versions; numerics-suite bisect finds the release that began it",
}
NOT_APPLIED = "not tried: it changes what is outside of the model; apply it, then run the same check again"
"""Of every other remedy that nothing here can apply to a copy."""

DEFINITION = "reference.oracle"
RIGHT = ("forward.deterministic", "forward.finite", DEFINITION)
"""Asked of every cured copy: one whose answers change from call to call, or are another model's, is not cured but unseen."""

IN_ORDER = ("tokenizer-raises", "no-pad-token", "padding-moves")
"""Measurements of `inputs.pipeline`, each of which can be taken only where those before it are fine."""

BY_THE_MODEL = frozenset({"merged-ids", "merged-edges", "out-of-range", *IN_ORDER})
"""Measurements of `inputs.*` that are taken on inputs as they should be, or as the cured tokenizer makes them. The others call the model as it should not be
called, by design; where the cure is to call it otherwise they say nothing of the cured call."""

LOWER_RATE = "lower-learning-rate"
SAME = 1e-3
"""Relative difference of two distances from the definition that are one: both are taken in true fp64 of rounded weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckAnswer:
    """What a check said of a cured copy; numbers and facts by measurement."""

    breaches: Sequence[Breach]
    measurements: Mapping[str, float]
    facts: Mapping[str, Mapping[str, Fact]] = field(default_factory=dict)


Ask = Callable[[str, CellContext], CheckAnswer]
"""Runs a check, by id, in another context with the batches of this run; NotApplicableError where it does not apply."""


def ask_once(check: str, context: CellContext) -> CheckAnswer:
    """Run a check that draws no batches.

    Raises:
        NotApplicableError: the check does not apply.
    """
    spec = get_check(check)
    if not spec.runs_on_nonfinite and context.broken:
        reason = f"weights are not finite: {context.broken[0]} (load.finite, load.head-init)"
        raise NotApplicableError(reason)
    measured = [item for item in spec.function(context) if isinstance(item, Measurement)]
    return answer_of(judge(check, measured), {each.name: each for each in measured})


def answer_of(breaches: Sequence[Breach], measured: Mapping[str, Measurement]) -> CheckAnswer:
    """The answer of a check."""
    numbers = {name: each.value for name, each in measured.items()}
    facts = {name: each.facts for name, each in measured.items() if each.facts}
    return CheckAnswer(breaches=breaches, measurements=numbers, facts=facts)


def breaks(check: str, context: CellContext) -> bool:
    """Whether the check fails there; False where it does not apply, or where the model cannot take the batch at all."""
    try:
        return bool(ask_once(check, context).breaches)
    except (NumericsSuiteError, *NO_RUN):
        return False


class TimeOverError(NumericsSuiteError):
    """Nothing more may be tried: a training loop waits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What an attempt showed.

    Attributes:
        works: None where what would show it could not be asked.
        found: the finding of that, where it was wanted.
    """

    works: bool | None
    effect: str
    left: Sequence[Breach] = ()
    found: Finding | None = None


def try_remedies(  # noqa: PLR0913 - two are for what is no cell
    check: str,
    finding: Finding,
    context: CellContext,
    ask: Ask,
    *,
    beside: Sequence[str] | None = None,
    begin: Callable[[str], CellContext] | None = None,
) -> tuple[Remedy, ...]:
    """The finding's remedies, tried; those that work first, each kind in the order of what they cost the user.

    Args:
        check: id of the check that failed.
        finding: of that check.
        context: the cell; nothing of it is changed.
        ask: runs a check again.
        beside: checks that a cured copy must pass too, None for those of a cell.
        begin: what a remedy of that name is tried on, where not every one can act on the same; NotApplicableError with the reason
            where there is nothing.
    """
    others: tuple[str, ...] = ()
    if begin is None:
        context, others = without_others(check, finding, context, ask)
    trial = _Trial(check=check, finding=finding, context=context, ask=ask, beside=beside, begin=begin, others=others)
    names = sorted((remedy.name for remedy in finding.remedies), key=cost_of)
    tried = [trial.remedy(name) for name in names]
    if not any(remedy.verified for remedy in tried):
        tried = combined(tried, finding, [name for name, moved in trial.moved.items() if moved], trial.together)
    return useful_first(tried)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    check: str
    finding: Finding
    context: CellContext
    ask: Ask
    beside: Sequence[str] | None = None
    begin: Callable[[str], CellContext] | None = None
    others: tuple[str, ...] = ()
    moved: dict[str, bool] = field(default_factory=dict)

    def _begin(self, name: str) -> CellContext:
        return self.context if self.begin is None else self.begin(name)

    def remedy(self, name: str) -> Remedy:
        """One remedy alone."""
        untried = Remedy(name=name, description=description_of(name, self.finding.cause))
        if name not in cures() and name != LOWER_RATE:
            return replace(untried, effect=NOT_HERE.get(name, NOT_APPLIED))
        try:
            with doing(f"{self.check} on {self.context.cell.id}: trying {name}"):
                seen = self._learning_rate() if name == LOWER_RATE else self._first_that_works(name)
        except (NotApplicableError, UnsupportedError, TimeOverError) as error:
            return replace(untried, effect=str(error))
        except Exception as error:  # noqa: BLE001 - a cure that cannot be tried never hides the finding
            line = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if self.finding.cause == RAISES and not isinstance(error, NumericsSuiteError):
                return replace(untried, verified=False, effect=f"still raises {line}"[:200])
            return replace(untried, effect=f"could not be tried: {line}"[:200])
        if seen is None:
            return replace(untried, effect="does not apply here")
        return replace(untried, verified=seen.works, effect=seen.effect)

    def together(self, names: Sequence[str], meant: Mapping[str, Finding]) -> Shown | None:
        """What the first way to apply each shows, one on top of the other; None where one cannot be applied."""
        with ExitStack() as stack:
            try:
                usual = self._begin("")
                context = next((begun for name in names if (begun := self._begin(name)) is not usual), usual)
                attempt = None
                for name in names:
                    ways = cures()[name](context, meant[name])
                    stack.callback(ways.close)  # type: ignore[attr-defined]  # a copy of the files lasts as long
                    attempt = next(ways)
                    context = attempt.context
                seen = None if attempt is None else self._seen(attempt, diagnose=True)
                return None if seen is None else Shown(works=seen.works is True, effect=seen.effect, left=seen.found)
            except Exception:  # noqa: BLE001 - as above
                return None

    def _first_that_works(self, name: str) -> _Outcome | None:
        last = None
        for attempt in cures()[name](self._begin(name), self.finding):
            last = self._seen(attempt)
            if last.works:
                return last
        self.moved[name] = last is not None and self.finding.title not in last.effect
        return last

    def _learning_rate(self) -> _Outcome | None:
        context = self._begin(LOWER_RATE)
        lr = context.request.plan.lr
        if not context.recipe.trains or not lr > 0:
            return None

        def seen(plan: TrainingPlan) -> _Outcome:
            return self._seen(Attempt(context=context.variant(plan=plan)))

        found = learning_rates(context.request.plan, lambda plan: bool(seen(plan).works))
        if found is None:
            return _Outcome(works=False, effect=f"no learning rate from {lr:.2g} down to {lr / 1e4:.1g} helps")
        held = seen(context.with_plan(lr=found))
        return replace(held, effect=f"lr {found:.2g} (was {lr:.2g}) is the largest that works: {held.effect}")

    def _seen(self, attempt: Attempt, *, diagnose: bool = False) -> _Outcome:
        """What the attempt shows.

        Raises:
            UnsupportedError: the model refuses the remedy's condition, so no check can pass under it.
        """
        cured = attempt.context
        try:
            cured.loaded  # noqa: B018 - here, for its refusal
            seen = self._judged(attempt)
            if seen.works and self.others:
                seen = replace(seen, effect=f"{seen.effect}; beside {', '.join(self.others)}, a finding of its own")
            return replace(seen, found=finding_of(seen.left, cured, None)) if diagnose and seen.left else seen
        finally:
            discard(cured)
            if attempt.meant is not None:
                discard(attempt.meant)

    def _judged(self, attempt: Attempt) -> _Outcome:
        """The failing check on the cured copy, then what shows that the cause is gone."""
        cured = attempt.context
        how = f"{attempt.how}: " if attempt.how else ""
        where = f", with {cured.origin}" if cured.origin else ""
        own = self._asked(self.check, attempt)
        breaches = self._that_count(own, attempt)
        if own is not None and breaches:
            effect = how + _still(replace(own, breaches=breaches), cured, self.check) + where
            return _Outcome(works=False, effect=effect, left=breaches)
        for check in SOUND:
            answer = self._asked(check, attempt)
            if answer is not None and answer.breaches:
                effect = f"{how}hides the symptom and leaves the cause: {title(answer.breaches[0])}"
                return _Outcome(works=False, effect=effect, left=answer.breaches)
        if own is None and cured.cell.precision == self.context.cell.precision:
            return _Outcome(works=None, effect=f"{how}cannot be tried: {self.check} has nothing to ask under it")
        for check in self._companions(cured):
            answer = self._asked(check, attempt)
            if answer is None and check == DEFINITION and attempt.meant is not None:
                effect = f"{how}{self.check} passes, and no definition is at hand to hold the answers to"
                return _Outcome(works=None, effect=effect)
            if answer is not None and answer.breaches and not self._excused(check, answer, attempt):
                effect = f"{how}{check} fails: {title(answer.breaches[0])}{where}"
                return _Outcome(works=False, effect=effect, left=answer.breaches)
            if answer is not None and check == DEFINITION and attempt.meant is not None:
                held = answer.measurements.get("true-logits", math.nan)
                how = f"{how}the answers are {held:.1g} from the definition; "
        return _Outcome(works=True, effect=how + self._effect(own, attempt))

    def _that_count(self, own: CheckAnswer | None, attempt: Attempt) -> Sequence[Breach]:
        """The breaches of the failing check that speak against the attempt."""
        breaches = () if own is None else own.breaches
        if not self.on_users_side or attempt.meant is not None:
            return breaches
        hidden = self._hidden()
        return [breach for breach in breaches if breach.measurement.name in BY_THE_MODEL.difference(hidden)]

    def _hidden(self) -> Sequence[str]:
        """Measurements that the failing one had hidden: what they say now is another finding's matter."""
        name = str(self.finding.evidence.get("measurement", ""))
        return IN_ORDER[IN_ORDER.index(name) + 1 :] if name in IN_ORDER else ()

    @property
    def on_users_side(self) -> bool:
        """The cure is to call the model otherwise."""
        return self.check.startswith("inputs.")

    def _companions(self, cured: CellContext) -> tuple[str, ...]:
        """Checks that must pass beside the one that failed."""
        if self.beside is not None:
            return tuple(self.beside)
        about_training = self.check.startswith(("train.", "load."))
        return (*TRAINS, *RIGHT) if about_training and cured.recipe.trains else RIGHT

    def _excused(self, check: str, answer: CheckAnswer, attempt: Attempt) -> bool:
        """Whether the model differs from its definition for an older reason than the cause: that is another finding's matter.

        So it is where it differs exactly as far without the cure, and where weights that are not finite kept it from being asked.
        Another NaN that becomes a number does not count: what it hid is seen only now. Nor does a cure that says what the definition is.
        """
        if check != DEFINITION or attempt.meant is not None:
            return False
        before = self.context.cached(_answer, DEFINITION, self.ask)
        worst = answer.breaches[0].measurement
        if before is None:
            return bool(self.context.broken)
        return math.isclose(before.measurements.get(worst.name, math.nan), worst.value, rel_tol=SAME)

    def _asked(self, check: str, attempt: Attempt) -> CheckAnswer | None:
        meant = attempt.meant if check == DEFINITION else None
        return _answer(meant or attempt.context, check, self.ask)

    def _effect(self, own: CheckAnswer | None, attempt: Attempt) -> str:
        """What the failing check measures now and before; where training is the question, or begins there, how it goes."""
        name = str(self.finding.evidence.get("measurement", ""))
        called_otherwise = self.on_users_side and name not in BY_THE_MODEL
        parts = []
        if self.check not in OF_TRAINING and not called_otherwise:
            parts += [before_and_after(self.finding, own)]
            parts[0] += opened(own) if parts[0] and own is not None and self.on_users_side else ""
        if self.check in STARTS_TRAINING or not any(parts):
            trains = self._curve(attempt)
            parts += [f"training is {trains}" if trains and any(parts) else trains]
        if any(parts):
            return "; ".join(part for part in parts if part)
        return f"{', '.join(self._companions(attempt.context))} pass" if own is None or self.on_users_side else "passes"

    def _curve(self, attempt: Attempt) -> str:
        """How the cured copy trains, empty where training is not the question."""
        cured = attempt.context
        if attempt.meant is not None or TRAINS[0] not in self._companions(cured):
            return ""
        try:
            return curve(cured.trajectory) + (f", with {cured.origin}" if cured.origin else "")
        except NumericsSuiteError:
            return ""


def _answer(context: CellContext, check: str, ask: Ask) -> CheckAnswer | None:
    try:
        return ask(check, context)
    except (NotApplicableError, UnsupportedError):
        return None  # in these conditions there is nothing to ask


def _still(answer: CheckAnswer, cured: CellContext, check: str) -> str:
    worst = answer.breaches[0]
    if check in {"train.finite", "train.clip", "train.amp"}:
        try:
            if cured.trajectory.bad is not None:
                return f"still fails: {curve(cured.trajectory)}"
        except NumericsSuiteError:
            pass
    return f"still fails: {title(worst)}"
