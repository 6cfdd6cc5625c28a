"""Trying remedies: each is applied to a fresh copy, the failing check is asked again, and what was seen is told.

`verified` is True where the check passes on the cured copy, together with what shows that nothing was merely hidden: the
weights are sound, the answers repeat and are those of the family's definition, and a cell that can train trains. It is False where that was tried and is not so, None where it
could not be tried here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from numerics_suite.core.errors import NotApplicableError, NumericsSuiteError, UnsupportedError
from numerics_suite.core.records import Finding, Remedy
from numerics_suite.diagnosing.added import cost_of, cures
from numerics_suite.diagnosing.cures import Attempt, learning_rates
from numerics_suite.diagnosing.findings import title
from numerics_suite.diagnosing.remedies import description_of, useful_first
from numerics_suite.engine.evidence import Evidence
from numerics_suite.engine.training_loop import Plan, Trajectory
from numerics_suite.judging.verdicts import Breach

SOUND = ("load.finite", "load.head-init")
"""Asked of every cured copy: a remedy under which one still fails hides the symptom and leaves the cause."""

TRAINS = ("train.finite", "train.descends")
"""Asked where the finding is about training or about the weights that training starts from."""

NOT_HERE = {
    "reload-weights": "cannot be tried: there is no other copy of the files here and nothing is fetched; "
    "run the same check on the files once they are fetched again",
    "newer-version": "not tried: --try-versions does, in environments of their own",
    "pin-version": "not tried: --try-versions does; numerics-suite bisect names the release that began it",
}

DEFINITION = "reference.oracle"
RIGHT = ("forward.deterministic", "forward.finite", DEFINITION)
"""Asked of every cured copy: one whose answers change from call to call, or are another model's, is not cured but unseen."""

BY_THE_MODEL = frozenset({"merged-ids", "merged-edges", "out-of-range"})
"""Measurements of `inputs.*` that are taken on inputs as they should be. The others call the model as it should not be
called, by design; where the cure is to call it otherwise they say nothing of the cured call."""

SAME = 1e-3
"""Relative difference of two distances from the definition that are one: both are taken in true fp64 of rounded weights."""

PAIRED = 3
"""Remedies from which pairs are made where none helps alone: the cheapest ones, so at most three pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a check said of a cured copy."""

    breaches: Sequence[Breach]
    measurements: Mapping[str, float]


Ask = Callable[[str, Evidence], Answer]
"""Asks a check, by id, of other evidence with the batches of this run; NotApplicableError where it has nothing to ask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What an attempt showed; `works` is None where what would show it could not be asked."""

    works: bool | None
    effect: str


def try_remedies(check: str, finding: Finding, evidence: Evidence, ask: Ask) -> tuple[Remedy, ...]:
    """The finding's remedies, tried; those that work first, each kind in the order of what they cost the user.

    Args:
        check: id of the check that failed.
        finding: of that check.
        evidence: the cell; nothing of it is changed.
        ask: asks a check again.
    """
    trial = _Trial(check=check, finding=finding, evidence=evidence, ask=ask)
    names = sorted((remedy.name for remedy in finding.remedies), key=cost_of)
    tried = [trial.remedy(name) for name in names]
    if not any(remedy.verified for remedy in tried):
        tried = list(trial.pairs(tried))
    return useful_first(tried)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trial:
    check: str
    finding: Finding
    evidence: Evidence
    ask: Ask

    def remedy(self, name: str) -> Remedy:
        """One remedy alone."""
        untried = Remedy(name=name, description=description_of(name))
        if name in NOT_HERE:
            return replace(untried, effect=NOT_HERE[name])
        try:
            seen = self._learning_rate() if name == "lower-learning-rate" else self._first_that_works(name)
        except NotApplicableError as error:
            return replace(untried, effect=str(error))
        except Exception as error:  # noqa: BLE001 - a cure that cannot be tried never hides the finding
            line = " ".join(str(error).split())
            return replace(untried, effect=f"could not be tried: {type(error).__name__}: {line}"[:200])
        if seen is None:
            return replace(untried, effect="does not apply here")
        return replace(untried, verified=seen.works, effect=seen.effect)

    def pairs(self, tried: Sequence[Remedy]) -> Iterator[Remedy]:
        """The remedies again, the first two that help together marked so."""
        failed = [remedy.name for remedy in tried if remedy.verified is False and remedy.name in cures()]
        together: dict[str, Remedy] = {}
        for one, other in itertools.combinations(failed[:PAIRED], 2):
            seen = self._both(one, other)
            if seen is not None and seen.works:
                for name, partner in ((one, other), (other, one)):
                    together[name] = Remedy(
                        name=name,
                        description=description_of(name),
                        verified=True,
                        effect=f"with {partner}, not alone: {seen.effect}",
                    )
                break
        for remedy in tried:
            yield together.get(remedy.name, remedy)

    def _both(self, one: str, other: str) -> _Seen | None:
        try:
            for first in cures()[one](self.evidence, self.finding):
                for second in cures()[other](first.evidence, self.finding):
                    return self._seen(second)
        except Exception:  # noqa: BLE001 - as above
            return None
        return None

    def _first_that_works(self, name: str) -> _Seen | None:
        last = None
        for attempt in cures()[name](self.evidence, self.finding):
            last = self._seen(attempt)
            if last.works:
                return last
        return last

    def _learning_rate(self) -> _Seen | None:
        if not self.evidence.recipe.trains:
            return None

        def holds(plan: Plan) -> bool:
            return bool(self._seen(Attempt(evidence=self.evidence.variant(plan=plan))).works)

        found = learning_rates(self.evidence.request.plan, holds)
        if found is None:
            lowest = self.evidence.request.plan.lr
            return _Seen(works=False, effect=f"no learning rate down to {lowest / 1e4:.1g} helps")
        plan = self.evidence.with_plan(lr=found)
        seen = self._seen(Attempt(evidence=self.evidence.variant(plan=plan)))
        return replace(seen, effect=f"lr {found:.2g} is the largest that holds: {seen.effect}")

    def _seen(self, attempt: Attempt) -> _Seen:
        """The failing check on the cured copy, then what shows that the cause is gone."""
        cured = attempt.evidence
        try:
            how = f"{attempt.how}: " if attempt.how else ""
            own = self._asked(self.check, attempt)
            breaches = self._that_count(own, attempt)
            if own is not None and breaches:
                return _Seen(works=False, effect=how + _still(replace(own, breaches=breaches), cured, self.check))
            for check in SOUND:
                answer = self._asked(check, attempt)
                if answer is not None and answer.breaches:
                    left = title(answer.breaches[0])
                    return _Seen(works=False, effect=f"{how}hides the symptom and leaves the cause: {left}")
            for check in self._companions(cured):
                answer = self._asked(check, attempt)
                if answer is None and check == DEFINITION and attempt.meant is not None:
                    effect = f"{how}{self.check} passes, and no definition is at hand to hold the answers to"
                    return _Seen(works=None, effect=effect)
                if answer is not None and answer.breaches and not self._excused(check, answer, attempt):
                    return _Seen(works=False, effect=f"{how}{check} fails: {title(answer.breaches[0])}")
                if answer is not None and check == DEFINITION and attempt.meant is not None:
                    held = answer.measurements.get("true-logits", math.nan)
                    how = f"{how}the answers are {held:.1g} from the definition; "
            return _Seen(works=True, effect=how + self._effect(own, attempt))
        finally:
            cured.let_go()
            if attempt.meant is not None:
                attempt.meant.let_go()

    def _that_count(self, own: Answer | None, attempt: Attempt) -> Sequence[Breach]:
        """The breaches of the failing check that speak against the attempt."""
        breaches = () if own is None else own.breaches
        if not self.on_users_side or attempt.meant is not None:
            return breaches
        return [breach for breach in breaches if breach.measurement.name in BY_THE_MODEL]

    @property
    def on_users_side(self) -> bool:
        """The cure is to call the model otherwise."""
        return self.check.startswith("inputs.")

    def _companions(self, cured: Evidence) -> tuple[str, ...]:
        """Checks that must hold beside the one that failed."""
        about_training = self.check.startswith(("train.", "load."))
        return (*TRAINS, *RIGHT) if about_training and cured.recipe.trains else RIGHT

    def _excused(self, check: str, answer: Answer, attempt: Attempt) -> bool:
        """Whether the model differs from its definition exactly as far without the cure: that is another finding's matter.

        A NaN that becomes a number does not count: what it hid is seen only now. Nor does a cure that says what the definition is.
        """
        if check != DEFINITION or attempt.meant is not None:
            return False
        if DEFINITION not in self.evidence.memo:
            self.evidence.memo[DEFINITION] = self._asked(DEFINITION, Attempt(evidence=self.evidence))
        before = self.evidence.memo[DEFINITION]
        worst = answer.breaches[0].measurement
        return before is not None and math.isclose(
            before.measurements.get(worst.name, math.nan), worst.value, rel_tol=SAME
        )

    def _asked(self, check: str, attempt: Attempt) -> Answer | None:
        meant = attempt.meant if check == DEFINITION else None
        try:
            return self.ask(check, meant or attempt.evidence)
        except (NotApplicableError, UnsupportedError):
            return None  # in these conditions there is nothing to ask

    def _effect(self, own: Answer | None, attempt: Attempt) -> str:
        cured = attempt.evidence
        if attempt.meant is None and set(TRAINS) <= set(self._companions(cured)):
            try:
                return curve(cured.trajectory)
            except NumericsSuiteError:
                pass
        name = str(self.finding.evidence.get("measurement", ""))
        before = self.finding.evidence.get("measured")
        after = own.measurements.get(name) if own is not None and not self.on_users_side else None
        if isinstance(before, (int, float)) and after is not None:
            return f"{name} {before:.3g} → {after:.3g}, {self.finding.evidence.get('allowed', 0):.3g} allowed"
        return f"{', '.join(self._companions(cured))} pass" if own is None or self.on_users_side else "passes"


def curve(run: Trajectory) -> str:
    """`finite; loss 1.79 → 0.48 in 5 steps`, or where it stopped being finite."""
    if run.bad is not None:
        return f"{run.bad.kind} {run.bad.name} is not finite at step {run.bad.step}"
    if not run.losses:
        return "finite"
    return f"finite; loss {run.losses[0]:.3g} → {run.losses[-1]:.3g} in {len(run.losses) - 1} steps"


def _still(answer: Answer, cured: Evidence, check: str) -> str:
    worst = answer.breaches[0]
    if check in {"train.finite", "train.clip", "train.amp"}:
        try:
            if cured.trajectory.bad is not None:
                return f"still fails: {curve(cured.trajectory)}"
        except NumericsSuiteError:
            pass
    return f"still fails: {title(worst)}"
