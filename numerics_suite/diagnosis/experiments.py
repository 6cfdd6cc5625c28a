"""The decisive experiment of each cause, and the confidence that its outcome gives.

A cause is a claim about what would be otherwise if one condition were changed. The condition is changed on a fresh
copy, the failing check is asked again, and the outcome speaks for the claim or against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from numerics_suite.core.errors import NotApplicableError, NumericsSuiteError
from numerics_suite.core.records import Fact, Finding
from numerics_suite.diagnosis.copies import discard
from numerics_suite.diagnosis.remedies import SAFE_EPS, initialised_head
from numerics_suite.diagnosis.remedy_trials import Ask, CheckAnswer
from numerics_suite.diagnosis.root_causes import SLOWER
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.training_loop import TrainingPlan
from numerics_suite.observations.finiteness import nan_count
from numerics_suite.subjects.zeroed_memory import Zeroed

Outcome = Literal["passes", "fails"]
FP32, FP64 = "in fp32", "in fp64"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One condition, changed.

    Attributes:
        expected: what the failing check then does if the cause is right.
        copy: the context under the condition, None where it cannot be made here.
    """

    name: str
    expected: Outcome
    copy: Callable[[CellContext], CellContext | None]


def _at(name: str) -> Callable[[CellContext], CellContext | None]:
    return lambda context: None if context.cell.precision == name else context.variant(precision_name=name)


def _with_plan(change: Callable[[TrainingPlan], TrainingPlan]) -> Callable[[CellContext], CellContext]:
    return lambda context: context.variant(plan=change(context.request.plan))


_slower = _with_plan(lambda plan: replace(plan, lr=plan.lr / SLOWER))
_with_eps = _with_plan(lambda plan: replace(plan, eps=SAFE_EPS))


SEMANTIC = Experiment(name=FP64, expected="fails", copy=_at("fp64"))
"""What no precision repairs is what the model computes, not how it rounds."""

WIDER = Experiment(name=FP32, expected="passes", copy=_at("fp32"))
"""What a wider format repairs is a matter of range or rounding."""

DECISIVE: dict[str, tuple[Experiment, ...]] = {
    "bad-initialisation": (Experiment(name="with the head initialised", expected="passes", copy=initialised_head),),
    "corrupt-weights": (replace(WIDER, expected="fails"),),
    "overflow": (WIDER,),
    "underflow": (WIDER,),
    "low-precision-section": (WIDER,),
    "invalid-operation": (replace(WIDER, expected="fails"),),
    "fully-masked-row": (
        Experiment(name="one row at a time", expected="passes", copy=lambda context: context.variant(rows=1)),
    ),
    "optimizer-underflow": (Experiment(name=f"with eps {SAFE_EPS:g}", expected="passes", copy=_with_eps), WIDER),
    "loss-scaling": (WIDER,),
    "divergence": (Experiment(name="at a hundredth of the learning rate", expected="passes", copy=_slower),),
    **dict.fromkeys(
        (
            *("padding-leak", "batch-leak", "future-leak", "cache-mismatch", "wrong-positions", "wrong-pooling"),
            *("wrong-loss", "wrong-gradient", "attention-mismatch", "semantic-error"),
        ),
        (SEMANTIC,),
    ),
}
"""By cause. One that is not here was not concluded but seen: a key that is ignored, two runs that differ."""


SEEN = frozenset({"coarser", "other-dtype"})
"""Measurements that count what an op or a tensor itself says: the dtype it computes in, or is held in."""


def with_confidence(check: str, finding: Finding, context: CellContext, ask: Ask) -> Finding:
    """The finding with the outcome of its cause's decisive experiments, and the confidence that follows."""
    facts: dict[str, Fact] = {}
    if finding.cause == "uninitialised-parameters":
        agrees = _depends_on_memory(finding, context)
        facts["loaded without poison"] = "other values" if agrees else "NaN again"
        return _told(finding, facts, agrees=agrees)
    experiments = DECISIVE.get(finding.cause)
    if experiments is None or finding.evidence.get("measurement") in SEEN:
        return _told(finding, facts, agrees=None, observed=finding.cause != "unknown")
    verdicts = []
    for experiment in experiments:
        outcome = _outcome(check, experiment, context, ask)
        if outcome is not None:
            facts[experiment.name] = outcome
            verdicts.append(outcome == experiment.expected)
    return _told(finding, facts, agrees=all(verdicts) if verdicts else None)


def _outcome(check: str, experiment: Experiment, context: CellContext, ask: Ask) -> Outcome | None:
    """None where the condition cannot be made, or the check has nothing to ask under it."""
    try:
        copy = experiment.copy(context)
        if copy is None:
            return None
        try:
            answer: CheckAnswer = ask(check, copy)
        finally:
            discard(copy)
    except (NotApplicableError, NumericsSuiteError, RuntimeError, MemoryError):
        return None
    return "fails" if answer.breaches else "passes"


def _depends_on_memory(finding: Finding, context: CellContext) -> bool:
    """Without poison the parameter holds something else: what is in it was there before it was made."""
    with Zeroed():  # type: ignore[no-untyped-call]
        plain = context.load(seed=context.request.seed).model
    names = [name for name in finding.parameters if name in dict(plain.named_parameters())]
    return any(not nan_count(plain.get_parameter(name).detach()) for name in names)


def _told(finding: Finding, facts: Mapping[str, Fact], *, agrees: bool | None, observed: bool = False) -> Finding:
    if observed:
        confidence = "high: seen, not concluded"
    elif agrees is None:
        confidence = "medium: no experiment applies here"
    else:
        confidence = "high: the experiment agrees" if agrees else "low: the experiment disagrees"
    return replace(finding, evidence={**finding.evidence, **facts, "confidence": confidence})
