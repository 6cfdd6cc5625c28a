"""Whether what the figures show is a mistake: the kept steps are taken again, and asked what the figures alone cannot tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from numerics_suite.checks.train.amp import LOST_SCALE
from numerics_suite.checks.train.grad_flow import loss_is_flat
from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.devices import random_state
from numerics_suite.diagnosis.consequences import NO_RUN
from numerics_suite.diagnosis.remedy_trials import ask_once
from numerics_suite.diagnosis.update_remedies import has_reentrant_checkpoints
from numerics_suite.engine.outputs import main_output
from numerics_suite.observations.roundoff import rms
from numerics_suite.training_watch.alarms import Alarm
from numerics_suite.training_watch.caught_step import CaughtStep, undisturbed
from numerics_suite.training_watch.diagnosis import CaughtContext
from numerics_suite.training_watch.gradient_end import end_of_gradient
from numerics_suite.training_watch.judge import HALVED
from numerics_suite.training_watch.updates import SILENT, UNREACHED, ZERO, dead, unreached

ONGOING = SILENT | {"loss-scale", HALVED}
"""Kinds of alarms of what goes on: the kept steps, taken further from the parameters as they are, show it again."""

ASKED = {UNREACHED: "train.updates", ZERO: "train.grad-flow"}
"""By kind of alarm, the check that runs on the replayed steps."""

FEW = 16
"""The most parameters, or modules of them, that are moved one by one in a loop that waits: two forward passes in float64 each."""

MOVED = 0.1
"""Times a parameter's size that it is moved by, so that what reads it differs in any precision."""


def confirmed(alarm: Alarm, scene: CaughtContext) -> Alarm | None:
    """The alarm with those parameters that the loss depends on all the same; None where it depends on none.

    Reentrant checkpoints, which lose the gradient of their parameters, are the script's; whatever else cuts it off is the model's own.
    A pooler that nothing reads, an expert that no token went to, the part for pictures in a batch of text get no gradient by design. Where
    the steps cannot be taken again the alarm is a warning, which says what was seen.
    """
    why = "the batches are no longer at hand" if scene.replay else "processes share the model"
    with undisturbed():
        for start in scene.starts:
            try:
                answer = ask_once(ASKED[alarm.kind], scene.caught(start))
            except (NumericsSuiteError, *NO_RUN) as error:
                why = " ".join(str(error).split())
                continue
            named = {name for breach in answer.breaches for name in breach.measurement.parameters}
            kept = [name for name in alarm.parameters if name in named]
            return _named(alarm, scene.caught(start), kept) if kept else None
    text = f"{alarm.text}, first {alarm.parameters[0]}; whether that is meant so could not be found out: {why}"
    return replace(alarm, bad=False, text=text)


def _named(alarm: Alarm, caught: CaughtStep, names: Sequence[str]) -> Alarm | None:
    """The alarm with its cause; None where the loss does not depend on the parameters."""
    if alarm.kind == ZERO:
        kept = (
            [name for name in names if not loss_is_flat(caught, [name])]
            if len(names) <= FEW
            else _moving(caught, names)
        )
        return dead(alarm, kept, end_of_gradient(caught, kept)) if kept else None
    if not _depends_on(caught, names):
        return None
    if has_reentrant_checkpoints(caught.model):
        return unreached(alarm.step, names, int(alarm.facts["parameters of the optimizer"]))
    return dead(alarm, names, end_of_gradient(caught, names))


def _moving(caught: CaughtStep, names: Sequence[str]) -> list[str]:
    """Of many parameters, those of the modules that the loss depends on; each module is asked once."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    own = {module: [name for name in names if name.rpartition(".")[0] == module] for module in modules[:FEW]}
    return [name for module in own.values() if not loss_is_flat(caught, module) for name in module]


def never_fits(alarm: Alarm, scene: CaughtContext) -> Alarm:
    """The alarm of a scale that is halved again and again, made bad where no scale down to 1 lets any of the kept steps pass.

    A scale that began too high is only on its way down; one whose gradients are not finite at 1 either skips every step. Where the
    steps cannot be taken again the scale itself says so once it is below 1.
    """
    with undisturbed():
        for start in scene.starts:
            try:
                caught = scene.caught(start)
                run = caught.train(replace(caught.once, init_scale=LOST_SCALE))
            except (NumericsSuiteError, *NO_RUN):
                continue
            if 0 < len(run.gradient_norms) == run.skipped and caught.recipe.loss_scaling:
                text = f"the GradScaler skips every step: the gradients of the last {start.steps} are not finite at a scale of {LOST_SCALE:g} either"
                return replace(alarm, kind="loss-scale", bad=True, text=text)
    return alarm


@torch.no_grad()
def _depends_on(caught: CaughtStep, names: Sequence[str]) -> bool:
    """Whether the first kept step computes otherwise once the parameters are moved, with its own random states: a layer that was dropped does not."""
    trainer = caught.trainer(caught.once)

    def answers() -> list[Tensor]:
        outputs = [run() for run in trainer.forwards(caught.first_step)]
        return [each["loss"] if "loss" in each else main_output(each)[1] for each in outputs]

    before = answers()
    with random_state.torch_seeded(0):
        for name in names:
            data = trainer.model.get_parameter(name).data
            data += MOVED * (rms(data) or 1.0) * torch.randn_like(data)
    return any(not torch.equal(old, new) for old, new in zip(before, answers(), strict=True))
