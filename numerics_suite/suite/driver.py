"""Asking one check of one cell: once, or over the batches that Hypothesis draws and shrinks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis

from numerics_suite.core import progress
from numerics_suite.core.activity import at, doing
from numerics_suite.core.errors import NotApplicableError, UnsupportedError
from numerics_suite.core.records import Batch, Measurement, Series
from numerics_suite.core.registry import CheckSpec
from numerics_suite.devices import random_state
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.digests import batch_key
from numerics_suite.engine.reference_ops import preserved
from numerics_suite.engine.true_passes import leave_other_attention
from numerics_suite.judgement.verdicts import Breach, judge
from numerics_suite.suite.draws import Draw, ask_of_each
from numerics_suite.suite.endings import NO_BATCH

PAD_INSIDE = "forward.finite"
"""The check that also gets batches with a pad id among real tokens."""

SEARCHED = 10
"""Batches drawn, before a check's share is taken, in search of a smaller one where a planned batch fails."""

SHRINKS = 60
"""Batches tried to make a failing one smaller: rows and lengths are a few choices each, and every try runs the model."""


class _BreachedError(Exception):
    """Tells Hypothesis that a batch fails."""


@dataclass(slots=True)
class Outcome:
    """What a check measured over all its batches.

    Attributes:
        worst: the largest value of each measurement (NaN above all), by name.
        breaches: worst first, of the smallest failing batch; empty when every batch passed.
        batch: that batch.
        examples: batches asked.
        planned: batches that are to be asked at most, 0 for a check without.
        latest: what the last batch measured.
        series: of the batch whose measurement of the series' name is worst; of the last one where there is none such.
    """

    worst: dict[str, Measurement] = field(default_factory=dict)
    breaches: list[Breach] = field(default_factory=list)
    batch: Batch | None = None
    examples: int = 0
    planned: int = 0
    latest: list[Measurement] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)

    def add(self, told: Iterable[Measurement | Series]) -> list[Measurement]:
        """Keep the worst of each measurement, and the series that go with it; returns the measurements as a list."""
        everything = list(told)
        self.latest = listed = [item for item in everything if isinstance(item, Measurement)]
        for measurement in listed:
            held = self.worst.get(measurement.name)
            if held is None or _worse(measurement, held) or _says_more(measurement, held):
                self.worst[measurement.name] = measurement
        for item in everything:
            if isinstance(item, Series) and self._keeps(item):
                self.series[item.name] = item
        return listed

    def _keeps(self, series: Series) -> bool:
        """Whether this batch's measurement is now the worst, so that its series is the one to show."""
        own = next((measurement for measurement in self.latest if measurement.name == series.name), None)
        return series.name not in self.series or own is None or self.worst[own.name] is own


LESS_IS_WORSE = {"bits"}


def _worse(new: Measurement, held: Measurement) -> bool:
    """Whether the new value is the one to show; NaN is the worst there is."""
    if held.value != held.value:
        return False
    if new.unit in LESS_IS_WORSE:
        return not new.value >= held.value
    return not new.value <= held.value


def _says_more(new: Measurement, held: Measurement) -> bool:
    """Whether it is as bad and has facts where the other has none, as a batch that a law skips."""
    return new.value == held.value and bool(new.facts) and not held.facts


def ask(spec: CheckSpec, context: CellContext, *, seed: int, max_examples: int | None = None) -> Outcome:
    """Ask a check of a cell; what it or the model's own code leaves behind never reaches the next one.

    Random numbers begin at the seed, and afterwards the model's attributes, buffers, hooks and config are as they were: a
    verdict is the same whatever was asked before.

    Args:
        spec: the check.
        context: the cell.
        seed: same seed, same batches; another seed, others.
        max_examples: batches that Hypothesis draws, and no planned ones; None for what the cell's effort plans.

    Raises:
        NotApplicableError: the check has nothing to ask here.
        CheckError: it measured nothing that a budget judges.
    """
    try:
        kept: AbstractContextManager[None] = preserved(context.model)
    except UnsupportedError:
        if "checkpoint" not in spec.needs:
            raise
        kept = (
            nullcontext()
        )  # what the files alone show needs no model; the check raises the same where it asks for one
    with random_state.seeded(seed), kept, doing(f"{spec.id}/{context.cell.id}"):
        return _ask(spec, context, seed=seed, max_examples=max_examples)


def _ask(spec: CheckSpec, context: CellContext, *, seed: int, max_examples: int | None) -> Outcome:
    outcome = Outcome()
    if not spec.runs_on_nonfinite and context.broken:
        reason = f"weights are not finite: {context.broken[0]} (load.finite, load.head-init)"
        raise NotApplicableError(reason)
    if not spec.batches:
        outcome.breaches = judge(spec.id, outcome.add(_told(spec, context)))
        outcome.examples = 1
        return outcome
    own = context.usable_own_batch
    if own is not None:
        try:
            _ask_batch(spec, context, own, outcome)
        except NotApplicableError:
            # Drawn batches have labels even where the user's own batch has none.
            if not context.takes_ids:
                raise
        if outcome.breaches:
            return outcome
    if context.takes_ids:
        _ask_drawn(spec, context, outcome, seed=seed, max_examples=max_examples)
    if outcome.examples == 0:
        raise NotApplicableError(NO_BATCH)
    return outcome


def _ask_drawn(spec: CheckSpec, context: CellContext, outcome: Outcome, *, seed: int, max_examples: int | None) -> None:
    """Ask it of the planned batches, whose passes other checks share, and of those that Hypothesis draws.

    A planned batch that breaks a law is examined alone: Hypothesis looks for the smallest one that does, and what it finds
    stands in its place.
    """
    drawn = context.batch_plan.drawn if max_examples is None else max_examples
    shared = context.planned_batches if max_examples is None else ()
    outcome.planned = outcome.examples + len(shared) + math.ceil(drawn * spec.share)
    for batch in shared:
        too_long = int(batch.tensors["input_ids"].shape[1]) + spec.adds > context.longest
        if too_long or (not batch.laws_apply and spec.id != PAD_INSIDE):
            continue
        if _ask_batch(spec, context, batch, outcome):
            drawn = max(drawn, SEARCHED)
            break
    if not outcome.examples:
        drawn = drawn or SEARCHED
    if drawn:
        _fuzz(spec, context, outcome, seed=seed, max_examples=max(1, math.ceil(drawn * spec.share)))


def _ask_batch(spec: CheckSpec, context: CellContext, batch: Batch, outcome: Outcome) -> list[Breach]:
    progress.batch(outcome.examples + 1, outcome.planned)
    at(f"{spec.id}/{context.cell.id}, batch {outcome.examples + 1}")
    measurements = outcome.add(_told(spec, context, batch))
    outcome.examples += 1
    breaches = judge(spec.id, measurements)
    if breaches:
        outcome.breaches, outcome.batch = breaches, batch
    return breaches


def _told(spec: CheckSpec, context: CellContext, *batch: Batch) -> list[Measurement | Series]:
    """What the check measures and shows; over passes of the cell's own attention where it breaks over those of another one."""
    told = list(spec.function(context, *batch))
    if judge(spec.id, [item for item in told if isinstance(item, Measurement)]) and leave_other_attention(context):
        told = list(spec.function(context, *batch))
    return told


def _fuzz(spec: CheckSpec, context: CellContext, outcome: Outcome, *, seed: int, max_examples: int) -> None:
    failing: set[Any] = set()
    tries = 0
    room = max(1, min(context.space.max_length, context.longest - spec.adds))
    draw = Draw(
        space=replace(context.space, max_length=room),
        pad_inside=spec.id == PAD_INSIDE,
        seed=seed,
        max_examples=max_examples,
        seeks=bool(spec.seeks),
    )

    def one(batch: Batch) -> None:
        nonlocal tries
        key = batch_key(batch.tensors)
        if key not in failing:
            # The search for a smaller batch ends here; those known to fail still do, so Hypothesis agrees.
            if failing and tries >= SHRINKS:
                return
            tries += bool(failing)
            if not _ask_batch(spec, context, batch, outcome):
                if spec.seeks:
                    _climb(outcome, spec.seeks)
                return
            failing.add(key)
        elif outcome.batch is not batch:
            # What has failed once has failed: a defect that comes and goes keeps the breach that was seen.
            again = judge(spec.id, outcome.add(_told(spec, context, batch)))
            if again:
                outcome.breaches, outcome.batch = again, batch
        raise _BreachedError

    with suppress(_BreachedError):
        ask_of_each(draw, one)


def _climb(outcome: Outcome, name: str) -> None:
    for measurement in outcome.latest:
        if measurement.name == name and math.isfinite(measurement.value):
            hypothesis.target(measurement.value, label=name)
