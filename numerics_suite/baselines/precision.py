"""What the cell computes in its own precision: answers, bits, headroom, and the error of the whole and of each module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.baselines import bits
from numerics_suite.baselines.batches import real_tokens, tensors_of, training_of
from numerics_suite.baselines.curve import LARGE, scope_of, trainable, why_untrained
from numerics_suite.baselines.decoding import decoded
from numerics_suite.baselines.records import GradientRecord, Sketch, StoredBatch
from numerics_suite.baselines.sketch import sketch
from numerics_suite.baselines.trace import (
    DECODED,
    HIDDEN,
    Trace,
    decoded_batch,
    named_answers,
    real_rows,
    trace_call,
)
from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.digests import tensor_digest
from numerics_suite.engine.references import is_reference_itself, routed_reason, routes
from numerics_suite.observations.headroom import Headroom, headroom
from numerics_suite.observations.local_error import LocalError, local_errors
from numerics_suite.observations.roundoff import CANCELLED, rms

REFERENCE = "fp64 is the reference itself"
TOO_LARGE = "above a billion parameters"


@dataclass(frozen=True, slots=True, kw_only=True)
class CellRuns:
    """The cell's own runs.

    Attributes:
        answers: float64 on the CPU, at real tokens, by the names of the true ones.
        bits: SHA-256 by part.
        least: the module with the least headroom, None without a floating output.
    """

    answers: dict[str, Tensor]
    bits: dict[str, str]
    least: Headroom | None
    gradients: dict[str, Sketch]


def run_cell(context: CellContext, batches: Sequence[StoredBatch], found: Trace, left_out: dict[str, str]) -> CellRuns:
    """Run all batches in the cell's precision.

    Args:
        context: of the cell.
        batches: stored.
        found: the true fp64 runs, whose bits are digested too where they are whole.
        left_out: gets what could not be measured, with the reason.
    """
    answers: dict[str, Tensor] = {}
    gradients: dict[str, Sketch] = {}
    true = [answer for name, answer in found.answers.items() if name != DECODED]
    raw: dict[str, list[Tensor]] = {"logits": [] if found.left_out else true}
    least: Headroom | None = None
    for batch in batches:
        tensors = tensors_of(batch, context)
        outputs, room = _forward(context, context.inputs_in(tensors))
        answers |= named_answers(batch, tensors, outputs)
        raw["logits"] += [real_rows(tensors, value) for name, value in outputs.items() if name != HIDDEN]
        least = _lesser(least, room)
    raw |= _training_numbers(context, tensors_of(training_of(batches), context), found, left_out, gradients)
    if "loss" in raw and not found.left_out:
        raw["loss"].append(torch.tensor(found.loss, dtype=torch.float64))
    if context.subject.task == "causal-lm" and context.takes_ids:
        try:
            tensors = context.inputs_in(tensors_of(decoded_batch(batches), context))
            got = decoded(context.run, tensors, context.model)
            answers[DECODED] = got.cpu().double()
            raw["decoding"] = [got, *([found.answers[DECODED]] if DECODED in found.answers else [])]
        except Exception as error:  # noqa: BLE001 - remote code may fail anyhow; the rest of the cell is measured all the same
            reraise_if_fatal(error)
            left_out["bits.decoding"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    digests = {name: tensor_digest(parts) for name, parts in raw.items()}
    return CellRuns(answers=answers, bits=digests, least=least, gradients=gradients)


def _forward(context: CellContext, tensors: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[Headroom]]:
    outputs: dict[str, Tensor] = {}
    call = trace_call(context, loss=False)

    def run(model: nn.Module, given: Mapping[str, Any]) -> object:
        outputs.update(context.runner.apply(lambda: call(model, given)))  # type: ignore[call-overload]
        return ()

    room = headroom(context.model, tensors, call=run, real=real_tokens(tensors))
    return outputs, room


def _lesser(least: Headroom | None, rooms: Sequence[Headroom]) -> Headroom | None:
    """The least headroom, NaN before all others."""
    for room in rooms:
        if least is None or math.isnan(room.bits) > math.isnan(least.bits) or room.bits < least.bits:
            least = room
    return least


def _training_numbers(
    context: CellContext,
    tensors: Mapping[str, Any],
    found: Trace,
    left_out: dict[str, str],
    gradients: dict[str, Sketch],
) -> dict[str, list[Tensor]]:
    reason = why_untrained(context, found)
    if context.subject.quantized:
        left_out["bits.loss"] = reason
        return {}
    if reason:
        left_out["bits.gradients"] = reason
    dtype = torch.float64 if context.recipe.parameters == "float64" else None
    with trainable(context, scope_of(context.model), dtype) as model:

        def keep(name: str, gradient: Tensor) -> None:
            gradients[name] = sketch(gradient)

        return bits.loss_and_gradients(context, model, tensors, gradients=not reason, on_gradient=keep)


# --- errors --------------------------------------------------------------------------------------------------------


def errors(
    context: CellContext, batches: Sequence[StoredBatch], found: Trace, seen: CellRuns, left_out: dict[str, str]
) -> tuple[float, float, int]:
    """Error of the cell, that of its rounded run (NaN where it was not measured), and the free numbers in them.

    Args:
        context: of the cell.
        batches: stored.
        found: the true fp64 runs.
        seen: the cell's own runs.
        left_out: gets what could not be measured, with the reason.
    """
    count = sum(answer.shape[0] * min(answer.shape[1], _hidden(context)) for answer in found.answers.values())
    return _relative(seen.answers, found.answers), _inherent(context, batches, found, left_out), count


def _hidden(context: CellContext) -> int:
    """An output holds no more free numbers than the state that it is computed from."""
    if not context.takes_ids:
        return 2**31
    return int(context.model.get_input_embeddings().weight.shape[1])  # type: ignore[operator]


def _relative(got: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> float:
    """Root mean square of the errors, each over the root mean square of its own answer: logits and states differ in size."""
    squares = numbers = 0.0
    for name, wanted in true.items():
        if name not in got:
            continue
        scale = rms(wanted)
        error = rms(got[name] - wanted)
        part = error / scale if scale else 0.0 if error == 0 else math.inf
        squares, numbers = squares + part**2 * wanted.numel(), numbers + wanted.numel()
    return math.sqrt(squares / numbers) if numbers else math.nan


def _inherent(context: CellContext, batches: Sequence[StoredBatch], found: Trace, left_out: dict[str, str]) -> float:
    reason = ""
    if is_reference_itself(context):
        reason = REFERENCE
    elif routes(context.model):
        reason = routed_reason()
    elif sum(p.numel() for p in context.model.parameters()) > LARGE:
        reason = TOO_LARGE
    rounded: dict[str, Tensor] = {}
    for batch in () if reason else batches:
        tensors = tensors_of(batch, context)
        run = context.runner.rounded(context.inputs_in(tensors), call=trace_call(context, loss=False))
        if run.left_out:
            reason = f"no rounded run: {', '.join(run.left_out[:3])}"
            break
        rounded |= named_answers(batch, tensors, run.outputs)
    if not reason and DECODED in found.answers:
        rounded |= _decoded_rounded(context, batches)
    if reason:
        left_out["inherent"] = reason
        return math.nan
    return _relative(rounded, found.answers)


def _decoded_rounded(context: CellContext, batches: Sequence[StoredBatch]) -> dict[str, Tensor]:
    tensors = context.inputs_in(tensors_of(decoded_batch(batches), context))

    def call(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Tensor]:
        return {DECODED: decoded(lambda piece, **words: call_model(model, piece, **words), given, model)}

    run = context.runner.rounded(tensors, call=call)
    return {} if run.left_out else {DECODED: run.outputs[DECODED].double().cpu()}


def gradient_errors(found: Trace, seen: CellRuns) -> tuple[GradientRecord, ...]:
    """The true gradients with their errors in the cell's precision."""
    sizes = [record.gradient.rms for record in found.gradients]
    largest = max((size for size in sizes if math.isfinite(size)), default=0.0)
    records = []
    for record in found.gradients:
        got, true = seen.gradients.get(record.name), record.gradient
        # What is left of terms that cancel is rounding alone.
        if got is None or true.rms <= CANCELLED * largest or got.shape != true.shape:
            records.append(record)
            continue
        error = rms(torch.from_numpy(got.projections - true.projections))
        records.append(replace(record, error=error / true.rms))
    return tuple(records)


def module_errors(
    context: CellContext, batches: Sequence[StoredBatch], left_out: dict[str, str]
) -> dict[str, LocalError]:
    """Each module's own error on the training batch, by name."""
    if is_reference_itself(context):
        left_out["local_error"] = REFERENCE
        return {}
    tensors = context.inputs_in(tensors_of(training_of(batches), context))
    autocast, call = context.condition.autocast, trace_call(context, loss=False)
    with context.condition.arithmetic():
        found = local_errors(context.model, tensors, autocast=autocast, call=call)
    return {error.module: error for error in found if not error.left_out}
