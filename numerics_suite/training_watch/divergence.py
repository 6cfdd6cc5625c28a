"""Training that runs away: what the older state says of the same batches, and whose update grew first."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import TYPE_CHECKING

import torch

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.records import Fact
from numerics_suite.diagnosis.consequences import NO_RUN
from numerics_suite.diagnosis.remedy_trials import breaks
from numerics_suite.engine.reproduce_step import least_rise
from numerics_suite.engine.training_loop import HaltedError
from numerics_suite.training_watch.alarms import Alarm
from numerics_suite.training_watch.caught_step import CaughtStep, Start, undisturbed
from numerics_suite.training_watch.judge import UPDATE_RATIO

if TYPE_CHECKING:
    from numerics_suite.training_watch.diagnosis import CaughtContext
    from numerics_suite.training_watch.ring import ForwardCall

DESCENDS = "train.descends"
LOSS_NOW = "loss on the kept batches now"
"""Fact of a finding in which the loss rose and every value is finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """The update that grew first.

    Attributes:
        parameter: whose it is.
        step: in which.
        ratio: its length over the parameter's.
    """

    parameter: str
    step: int
    ratio: float

    @property
    def facts(self) -> Mapping[str, Fact]:
        """As they stand in a finding's evidence."""
        return {"update that grew first": self.parameter, "in step": self.step, "update-to-weight ratio": self.ratio}


def diverged(alarm: Alarm, scene: CaughtContext) -> Alarm | None:
    """The alarm of a loss that rose, made bad where the loop's own steps are what raised it; None where they are not.

    The state before them has a lower loss on each of the kept batches, and trained from there in the same way it loses it again. Where the older
    state is as bad on them the batches are harder, and where training from there descends the rise may pass. Where neither can be shown it is an early warning.

    Args:
        alarm: of kind `loss-rose`.
        scene: what a replay needs; its first start is an older state, its last one the state as it is.
    """
    older = next((start for start in scene.starts if start.parameters and start.loop is not None), None)
    now = next((start for start in scene.starts if not start.parameters), None)
    if older is None or now is None:
        return _told(alarm, "no older state is at hand to compare with (snapshot_every)")
    with undisturbed():
        try:
            before, after = _losses(scene.caught(older)), _losses(scene.caught(now))
            if not before or not after:
                return _told(alarm, "the loss is computed outside of the model")
            rises = [new - old for old, new in zip(before, after, strict=False)]
            if min(rises) <= 0 or median(rises) < least_rise(fmean(before)):
                return None
            caught = scene.caught(older)
            if not runs_away(caught):
                return None
            growth = first_to_grow(scene.caught(older))
        except (NumericsSuiteError, *NO_RUN) as error:
            return _told(alarm, " ".join(str(error).split()))
    facts: dict[str, Fact] = {
        LOSS_NOW: fmean(after),
        "loss on them with the older state": fmean(before),
        "caused by": THE_STATE,
    }
    facts |= growth.facts if growth is not None else {}
    module = growth.parameter.rpartition(".")[0] if growth is not None else None
    text = f"the loss is {alarm.facts['loss']:.4g} and began at {alarm.facts['first loss']:.4g}: on the same batches the older state has {fmean(before):.4g}"
    return replace(alarm, bad=True, text=text, facts={**alarm.facts, **facts}, module=module)


def _told(alarm: Alarm, why: str) -> Alarm:
    return replace(alarm, text=f"{alarm.text}; {why}")


def runs_away(caught: CaughtStep) -> bool:
    """Whether the kept steps, taken from an older state, raise the loss on their batches or end in what is not finite."""
    return caught.trajectory.bad is not None or breaks(DESCENDS, caught)


@torch.no_grad()
def _losses(caught: CaughtStep) -> list[float]:
    trainer = caught.trainer(caught.once)
    steps = dict.fromkeys(trainer.numbers())
    every = [[float(out["loss"]) for run in trainer.forwards(step) if "loss" in (out := run())] for step in steps]
    return [fmean(losses) for losses in every if losses]


def first_to_grow(caught: CaughtStep) -> Growth | None:
    """The update that first moves a parameter by more than a tenth of its length; where none does, the largest."""
    trainer = caught.trainer(caught.once)
    largest: Growth | None = None
    for step in trainer.numbers():
        before = {name: p.detach().clone() for name, p in trainer.parameters.items()}
        try:
            trainer.step(step)
        except HaltedError:
            break
        for name, parameter in trainer.parameters.items():
            length = float(before[name].double().norm())
            # Zeros have no length: whatever they become, nothing says that it is much.
            ratio = float((parameter.detach() - before[name]).double().norm()) / length if length else 0.0
            if math.isfinite(ratio) and (largest is None or ratio > largest.ratio):
                largest = Growth(parameter=name, step=step, ratio=ratio)
        if largest is not None and largest.ratio > UPDATE_RATIO:
            break
    return largest


THE_STATE, THE_BATCH = "the state", "the batch:"
"""How the fact `caused by` begins where the parameters are what is wrong, and where the batch alone is."""


def growth_facts(scene: CaughtContext) -> Mapping[str, Fact]:
    """Whose update grew first when the kept steps are taken again from an older state; nothing where they cannot be."""
    older = next((start for start in scene.starts if start.parameters and start.loop is not None), None)
    if older is None:
        return {}
    try:
        with undisturbed():
            growth = first_to_grow(scene.caught(older))
    except (NumericsSuiteError, *NO_RUN):
        return {}
    return {} if growth is None else growth.facts


def blame(scene: CaughtContext, step: int) -> Mapping[str, Fact]:
    """Whether the batch or the state made the step bad: its batch with an older state, and another batch with its state."""
    older = next((start for start in scene.starts if start.parameters and start.loop is not None), None)
    if older is None or older.first == step or step not in {call.step for call in older.calls}:
        return {}
    try:
        with undisturbed():
            if not _is_finite(scene.caught(older), step):
                return {"caused by": f"{THE_BATCH} it is not finite with the older state either"}
            own = next((start for start in scene.starts if not start.parameters), None)
            other = [call for call in older.calls if call.step < step]
            if own is None or scene.updated or not other:
                return {"caused by": f"{THE_STATE}: the same batch is finite with the older one"}
            elsewhere = _is_finite(scene.caught(_over(own, other)), other[-1].step)
    except (NumericsSuiteError, *NO_RUN):
        return {}
    if elsewhere:
        return {"caused by": "the batch in this state: each is finite with another"}
    return {"caused by": f"{THE_STATE}: another batch is not finite either, and this one is with the older state"}


def _over(start: Start, calls: Sequence[ForwardCall]) -> Start:
    return replace(start, calls=calls, whole=False)


def _is_finite(caught: CaughtStep, step: int) -> bool:
    """Whether that one step has a finite loss and finite gradients from the start's state."""
    try:
        caught.trainer(caught.once).step(step)
    except HaltedError as halted:
        return halted.bad.kind not in {"logits", "loss", "gradient"}
    return True
