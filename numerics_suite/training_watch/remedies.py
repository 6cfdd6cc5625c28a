"""The remedies of what the watch caught, tried by the suite's own engine on the kept steps."""

from __future__ import annotations

import time
from dataclasses import replace

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Finding, Remedy
from numerics_suite.diagnosis.consequences import NO_RUN
from numerics_suite.diagnosis.experiments import with_confidence
from numerics_suite.diagnosis.remedy_register import useful_first
from numerics_suite.diagnosis.remedy_trials import (
    NOT_HERE,
    TRAINS,
    CheckAnswer,
    TimeOverError,
    ask_once,
    breaks,
    try_remedies,
)
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.training_watch.caught_step import CaughtStep, undisturbed
from numerics_suite.training_watch.diagnosis import CaughtContext
from numerics_suite.training_watch.divergence import DESCENDS, LOSS_NOW, runs_away

ITS_OWN_CHECK = "train.finite"
"""What the watch asks in each step, this check asks of a few."""

CHECKS = {
    "loss-scaling": "train.amp",
    "wrong-input-dtype": "inputs.pipeline",
    "untrained-parameters": "train.updates",
    "dead-gradient": "train.grad-flow",
    "rounded-update": "train.updates",
}
"""By cause, the check that asks what the watch asked; all others are :data:`ITS_OWN_CHECK`'s."""


def check_of(finding: Finding) -> str:
    """The check that measures what the watch found."""
    return DESCENDS if LOSS_NOW in finding.evidence else CHECKS.get(finding.cause, ITS_OWN_CHECK)


BEFORE_THE_STEP = frozenset({"clip-grad-norm", "lower-learning-rate", "larger-optimizer-eps"})
"""Remedies that act when an optimizer steps: where the step's own passes go bad they must be tried on the steps before."""


def with_remedies_tried(finding: Finding, scene: CaughtContext) -> Finding:
    """The finding with the experiment of its cause made and its remedies tried, by the suite's own engine; those that work first.

    Nothing is verified without a replay: first the steps are taken as they were, and only where they go bad again does a remedy
    under which they do not say anything.
    """
    check = check_of(finding)
    known = tuple(remedy for remedy in finding.remedies if remedy.verified is not None)
    asked = replace(finding, remedies=tuple(remedy for remedy in finding.remedies if remedy.verified is None))
    until = time.monotonic() + scene.seconds

    def ask(name: str, context: CellContext) -> CheckAnswer:
        if time.monotonic() >= until:
            reason = f"not tried: the {scene.seconds:g} seconds for it were over; numerics-suite check --bundle has no such limit"
            raise TimeOverError(reason)
        return ask_once(name, context)

    with undisturbed():
        try:
            replays = _Replays(check=check, step=finding.step or 0, scene=scene)
            first = replays.begin("")
        except NotApplicableError as error:
            return left_untried(finding, str(error))
        except NO_RUN as error:
            return left_untried(
                finding, f"could not be tried: {type(error).__name__}: {' '.join(str(error).split())}"[:200]
            )
        tried = try_remedies(check, asked, first, ask, beside=TRAINS, begin=replays.begin)
        # The experiment comes last: where time is short, what to do matters more than how sure the cause is.
        found = with_confidence(check, asked, first, ask)
    return replace(found, remedies=useful_first((*known, *tried)))


class _Replays:
    """The starts from which the steps go bad again as they were."""

    def __init__(self, *, check: str, step: int, scene: CaughtContext) -> None:
        self.check, self.step, self.scene = check, step, scene
        self.caught: list[tuple[CaughtStep, bool]] = []
        for start in scene.starts:
            caught = scene.caught(start)
            acts = self._goes_bad(caught)
            if acts is not None:
                self.caught.append((caught, acts))

    def _goes_bad(self, caught: CaughtStep) -> bool | None:
        """Whether a step was taken before, so that what acts on steps can be tried; None where nothing goes bad."""
        if self.check != ITS_OWN_CHECK:
            # What a loss that rises from an older state runs into may be no number any more.
            again = runs_away(caught) if self.check == DESCENDS else breaks(self.check, caught)
            return True if again else None
        bad = caught.train(caught.once).bad
        if bad is None or bad.step > max(self.step, caught.first_step):
            return None
        return bad.kind in {"parameter", "optimizer state"} or caught.first_step < bad.step or caught.first_step <= 1

    def begin(self, name: str) -> CaughtStep:
        """What a remedy is tried on: the first that it can act on.

        Raises:
            NotApplicableError: there is none, with the reason.
        """
        if not self.caught:
            raise NotApplicableError(self._why_not())
        for caught, acts in self.caught:
            if name not in BEFORE_THE_STEP or (caught.start.loop is not None and acts):
                return caught
        if all(caught.start.loop is None for caught, _ in self.caught):
            reason = "not tried: it acts when the optimizer steps, and only the forward pass, or forward and backward, can be run again"
        else:
            reason = f"not tried: it acts on the steps before step {self.step}, and no snapshot from before them was kept (snapshot_every)"
        raise NotApplicableError(reason)

    def _why_not(self) -> str:
        starts = self.scene.starts
        if not self.scene.replay:
            return "not tried: the model is shared by processes, and a replay by one would wait for the others"
        if not starts:
            return "not tried: no batch of that step is left to run again, or the parameters are no longer finite and no snapshot was kept (snapshot_every)"
        words = " or ".join(start.words for start in starts)
        gap = "" if all(start.whole for start in starts) else "; the ring lacks steps since then (ring)"
        return f"not tried: what was kept stays finite when it runs again, from {words}{gap}"


def left_untried(finding: Finding, reason: str) -> Finding:
    """The finding whose untried remedies say why."""
    told = [
        replace(remedy, effect=NOT_HERE.get(remedy.name, reason)) if _is_untried(remedy) else remedy
        for remedy in finding.remedies
    ]
    return replace(finding, remedies=tuple(told))


def _is_untried(remedy: Remedy) -> bool:
    return remedy.verified is None and (not remedy.effect or remedy.effect.startswith("not tried"))
