"""From a bad reading to a finding: run the step again, find the op, name the cause."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.attributes import with_attribute
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Batch, Fact, Finding
from numerics_suite.diagnosis.consequences import NO_RUN
from numerics_suite.diagnosis.findings import batch_as_json
from numerics_suite.diagnosis.remedy_register import remedies_of, untried
from numerics_suite.diagnosis.root_causes import (
    REMEDIES,
    bad_input,
    cause_of,
    cause_of_run,
    eps_underflows,
    origin_facts,
)
from numerics_suite.diagnosis.versions_advice import borne_out_of
from numerics_suite.engine.calls import call_with, input_device
from numerics_suite.engine.runner import dropped_gradients
from numerics_suite.inputs.labels import no_label_counts, predicts_next_token
from numerics_suite.observations.bad_value_location import Origin, find_origin
from numerics_suite.subjects.tasks import is_head
from numerics_suite.training_watch.alarms import Alarm
from numerics_suite.training_watch.caught_step import CaughtStep, Start, bad_parameters, undisturbed
from numerics_suite.training_watch.divergence import THE_BATCH, blame, growth_facts
from numerics_suite.training_watch.inputs import named_inputs
from numerics_suite.training_watch.judge import ROSE
from numerics_suite.training_watch.ring import ForwardCall, as_called, same_buffers, with_values
from numerics_suite.training_watch.snapshots import SMALL_BYTES
from numerics_suite.training_watch.updates import SILENT

SECONDS = 60.0
"""As long as a loop that stops is kept for its remedies."""

EXPLANATIONS = {
    "uninitialised-parameters": "Parameters of a head that the checkpoint lacks were not finite before the first step: they were never initialised.",
    "corrupt-weights": "Parameters were not finite before the first step: the file, or what was done to the model after loading it.",
    "wrong-input-dtype": "Token ids name rows of a table; as floating numbers, or rounded to bfloat16 on the way (8 bits), they name other rows.",
    "out-of-range-input": "The batch itself holds what the model cannot take: a value that is not finite, an id without a row of the embedding, a label without a class.",
    "overflow": "The op's inputs are finite and its result is larger than the largest number of its dtype.",
    "invalid-operation": "The op's inputs are finite and its result is not: it divided by zero or left its domain.",
    "fully-masked-row": "A softmax over a row whose every score is masked is 0/0.",
    "optimizer-underflow": "Gradients were finite, the optimizer's eps is 0 in the parameters' dtype, and 0/0 is NaN.",
    "divergence": "The optimizer's own steps carried the parameters away: what was finite, or low, before them no longer is.",
    "loss-scaling": "No loss scale makes the gradients finite, so GradScaler skips every step and training only looks calm.",
    "no-counted-labels": "A loss is the mean over the labels that count; every label of this batch is -100, and 0/0 is NaN.",
    "untrained-parameters": "Parameters that the loop means to train get no gradient, or no optimizer holds them: the loss may fall, and they stay as they are.",
    "dead-gradient": "The loss depends on these parameters and their gradient is absent or exactly zero: a branch is detached, or a backward pass returns zeros, in the module that is named.",
    "rounded-update": "The steps are smaller than the spacing of the parameters' dtype: less of them is held than one rounding of their sum would lose.",
    "wrong-gradient": "The optimizer steps by a gradient that no backward pass of this step wrote: weight decay and momentum move what was frozen.",
    "untied-weights": "What the config ties is two tensors, so training moves one without the other, and a copy that is loaded again has one of them twice.",
    "unknown": "The value was seen and could not be produced again from what is at hand.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CaughtContext:
    """What is at hand when a bad value was seen.

    Attributes:
        model: the plain model, without wrappers.
        optimizer: the plain optimizer, None where no step was taken yet.
        calls: forward passes of the bad step that are still in the ring.
        starts: places from which the step can be replayed on a copy, the one that shows most first.
        snapshot: parameters kept earlier, on the CPU; empty without one.
        snapshot_step: the step before which it was taken.
        updated: an optimizer step was taken since the bad value arose.
        initially_bad: parameters that were not finite when the watch began.
        scale: the loss scale, 1 without one.
        replay: it may be run again: this process alone holds the whole model, so that no collective waits for another.
        largest_copy: bytes of parameters of which a copy is made.
        seconds: after which no further remedy is begun.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    calls: Sequence[ForwardCall]
    starts: Sequence[Start] = ()
    snapshot: Mapping[str, Tensor] = field(default_factory=dict)
    snapshot_step: int = 0
    updated: bool = False
    initially_bad: tuple[str, ...] = ()
    scale: float = 1.0
    replay: bool = True
    largest_copy: float = SMALL_BYTES
    seconds: float = SECONDS

    def caught(self, start: Start) -> CaughtStep:
        """The steps from there on, as something that can be run again."""
        uninitialised = self.initially_bad if is_head(self.initially_bad) else ()
        return CaughtStep(self.model, start, uninitialised=uninitialised, largest=self.largest_copy)


def finding_of(alarm: Alarm, scene: CaughtContext) -> Finding:
    """The finding of a bad value: replayed, located, its cause named."""
    if alarm.kind in SILENT or alarm.kind == ROSE:
        return _silent(alarm, scene)
    bad = bad_parameters(scene.model)
    inputs = [named_inputs(scene.model, call) for call in scene.calls]
    name = next((name for given in inputs if (name := bad_input(given)) is not None), None)
    if name is not None and alarm.cause is None and not scene.initially_bad:
        alarm = replace(alarm, cause="out-of-range-input", text=f"{alarm.text}; the input {name} is not either")
    elif alarm.cause is None and not bad and _no_label_counts(alarm, scene, inputs):
        alarm = replace(alarm, cause=NO_LABELS, text=f"{alarm.text}; no label of the batch counts, all are -100")
    trained = None if _is_known(alarm, scene) else trained_again(scene, alarm.step)
    if trained is not None:
        origin, how, cause = trained
    else:
        origin, how = _replayed(alarm, scene, bad)
        cause = _cause(alarm, scene, origin, bad)
    facts: dict[str, Fact] = {**alarm.facts, "replay": how}
    if alarm.kind in {"logits", "loss", "gradient"} and cause in RUN_AWAY:
        facts |= blame(scene, alarm.step)
        cause = _carried_away(cause, origin, facts)
        facts |= growth_facts(scene) if cause == "divergence" else {}
    if origin is not None:
        facts |= origin_facts(origin)
    if bad:
        facts["parameters not finite now"] = len(bad)
    parameters = (origin.parameters if origin else ()) or scene.initially_bad
    if alarm.kind == "parameter" or (origin is None and not scene.updated):
        parameters = parameters or bad
    found = Finding(
        cause=cause,
        title=title(alarm, cause, origin, parameters),
        explanation=EXPLANATIONS[cause],
        module=_module(origin, parameters, facts),
        op=origin.op if origin else None,
        source=origin.source if origin else None,
        step=alarm.step,
        parameters=parameters,
        evidence=facts,
        batch=_batch(alarm.step, inputs),
        remedies=untried((*REMEDIES.get(cause, ()), *remedies_of(cause)), cause),
    )
    return borne_out_of(found, scene.model)


def _module(origin: Origin | None, parameters: Sequence[str], facts: Mapping[str, Fact]) -> str | None:
    """Where the value began; of training that ran away, whose update grew first where the value began in no module."""
    if origin is not None and origin.module:
        return origin.module
    first = parameters[0] if parameters else str(facts.get("update that grew first", ""))
    return first.rpartition(".")[0] or None


RUN_AWAY = frozenset({"divergence", "overflow", "invalid-operation", "unknown"})
"""Causes of a value that may be due to where the steps have led."""


def _carried_away(cause: str, origin: Origin | None, facts: Mapping[str, Fact]) -> str:
    """`divergence` where what overflows has float32's range and an older state is finite on the same batch: only steps lead there."""
    wide = origin is not None and origin.dtype in {"float32", "bfloat16", "float64"}
    moved = not str(facts.get("caused by", THE_BATCH)).startswith(THE_BATCH)
    return "divergence" if cause == "overflow" and wide and moved else cause


def _silent(alarm: Alarm, scene: CaughtContext) -> Finding:
    """The finding of training in which every value is finite, and parameters do not move, or the loss rises."""
    assert alarm.cause is not None
    inputs = [named_inputs(scene.model, call) for call in scene.calls]
    return Finding(
        cause=alarm.cause,
        title=f"{alarm.text}{f', first {alarm.parameters[0]}' if alarm.parameters else ''}: {alarm.cause}",
        explanation=EXPLANATIONS[alarm.cause],
        module=alarm.module or (alarm.parameters[0].rpartition(".")[0] if alarm.parameters else None),
        step=alarm.step,
        parameters=alarm.parameters,
        evidence=dict(alarm.facts),
        batch=_batch(alarm.step, inputs),
        remedies=untried((*REMEDIES.get(alarm.cause, ()), *remedies_of(alarm.cause)), alarm.cause),
    )


NO_LABELS = "no-counted-labels"
"""The cause that lies in the batch, wherever its NaN shows first."""

LABELLED = frozenset({"loss", "gradient"})
"""Alarms that a batch without labels raises: its logits are fine."""


def _no_label_counts(alarm: Alarm, scene: CaughtContext, inputs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a forward pass of the step had labels of which none counts; for a gradient, every pass."""
    shifted = predicts_next_token(scene.model)
    empty = [no_label_counts(given, shifted=shifted) for given in inputs]
    return alarm.kind in LABELLED and bool(empty) and (all(empty) if alarm.kind == "gradient" else any(empty))


def title(alarm: Alarm, cause: str, origin: Origin | None, parameters: Sequence[str]) -> str:
    """One line: what is wrong, where it began, why."""
    if parameters and (origin is None or origin.parameters):
        others = f", nor are {len(parameters) - 1} more" if parameters[1:] else ""
        where = f"; {parameters[0]} is not finite itself{others}"
    elif origin is not None and cause != NO_LABELS:
        place = ", ".join(part for part in (origin.op, origin.source) if part)
        side = " in the backward pass" if origin.backward else ""
        where = f"; it began in {origin.module} ({place}){side}" if origin.module else f"; it began at {place}{side}"
    else:
        where = ""
    return f"{alarm.text}{where}: {cause}"


def _batch(step: int, inputs: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    drawn = f"forward pass {len(inputs)} of step {step}"
    return batch_as_json(Batch(tensors=inputs[-1], drawn=drawn)) if inputs else None


def _cause(alarm: Alarm, scene: CaughtContext, origin: Origin | None, bad: tuple[str, ...]) -> str:
    if alarm.cause is not None:
        return alarm.cause
    if scene.initially_bad:
        return "uninitialised-parameters" if is_head(scene.initially_bad) else "corrupt-weights"
    spoiled = origin.parameters if origin else (bad if not scene.updated else ())
    if alarm.kind == "parameter" or spoiled:
        return "optimizer-underflow" if eps_underflows(filter(None, [scene.optimizer])) else "divergence"
    return cause_of(origin) if origin else "unknown"


def _is_known(alarm: Alarm, scene: CaughtContext) -> bool:
    return alarm.cause is not None or alarm.kind == "inputs" or bool(scene.initially_bad)


def trained_again(scene: CaughtContext, step: int) -> tuple[Origin | None, str, str] | None:
    """Place, what was run and cause of the bad step as it comes about from a snapshot on; None where it cannot, or stays finite."""
    start = next((start for start in scene.starts if start.parameters and start.whole), None)
    if start is None or start.loop is None or (not scene.updated and start.first == step):
        return None
    try:
        with undisturbed():
            caught = scene.caught(start)
            bad = caught.train(caught.once).bad
            if bad is None:
                return None
            origin, cause = cause_of_run(caught, caught.once, bad)
    except (NotApplicableError, *NO_RUN):
        return None
    on = f", trained on to step {bad.step}" if bad.step > start.first else ""
    return origin, f"with {start.words}{on}", cause or "unknown"


def _replayed(alarm: Alarm, scene: CaughtContext, bad: tuple[str, ...]) -> tuple[Origin | None, str]:
    """Where the value began, and what was run to find out."""
    if alarm.kind in {"inputs", "parameter"}:
        return None, "none: nothing in the forward or backward pass was wrong"
    if not scene.replay:
        return None, "none: the model is shared by processes, and a replay by one would wait for the others"
    if not scene.calls:
        return None, "none: the batches of that step had left the ring"
    spoiled_by_steps = bool(bad) and scene.updated and set(bad) != set(scene.initially_bad)
    if spoiled_by_steps and not scene.snapshot:
        return None, "none: the parameters are no longer finite and no snapshot was kept (snapshot_every)"
    values: Mapping[str, Tensor] = scene.snapshot if scene.updated else {}
    exact = not scene.updated
    held = "the parameters of that step" if exact else "the current parameters, a step later"
    if values:
        held = f"the snapshot from before step {scene.snapshot_step}"
    # Without the parameters of that step only the forward pass can be trusted to go wrong in the same place.
    origin = run_again(scene, values, backward=exact or bool(values))
    return origin, f"with {held}" + ("" if origin else "; it stayed finite")


def run_again(scene: CaughtContext, values: Mapping[str, Tensor], *, backward: bool) -> Origin | None:
    """Make the scene's calls again and name the first op that goes wrong; the model is left as it was.

    Args:
        scene: model, calls, loss scale.
        values: parameters to run with in place of the model's own.
        backward: differentiate the model's own loss too, where the forward pass stays finite.
    """
    model = scene.model
    with contextlib.ExitStack() as stack:
        stack.enter_context(same_buffers(model.buffers))
        stack.enter_context(with_values(dict(model.named_parameters()), values))
        # A model that was compiled in place runs as it is written, op by op.
        stack.enter_context(with_attribute(model, "_compiled_call_impl", None))
        for run in (_forward, *((_backward,) if backward else ())):
            for call in scene.calls:
                with as_called(call, input_device(model)):
                    origin = find_origin(model, functools.partial(_tolerant, run, model, call, scene.scale))
                if origin is not None:
                    return origin
    return None


def _tolerant(
    run: Callable[[nn.Module, ForwardCall, float], None], model: nn.Module, call: ForwardCall, scale: float
) -> None:
    """A replay that ends in an error has shown what it could."""
    with contextlib.suppress(*NO_RUN):
        run(model, call, scale)


def _forward(model: nn.Module, call: ForwardCall, _scale: float) -> None:
    with torch.no_grad():
        call_with(model, call.args, call.kwargs)


def _backward(model: nn.Module, call: ForwardCall, scale: float) -> None:
    """Gradients that go nowhere: those that the loop has accumulated stay."""
    dropped_gradients(model, call.args, call.kwargs, scale)
