"""What the model computes in true fp64: answers, loss, gradients, and the state around every module, sketched as it runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from numerics_suite.baselines.batches import real_tokens, tensors_of, training_of
from numerics_suite.baselines.checkpointing import Caller, checkpointed
from numerics_suite.baselines.decoding import decoded
from numerics_suite.baselines.records import AnswerRecord, GradientRecord, Sketch, StoredBatch
from numerics_suite.baselines.sketch import Sketcher, condensed, nothing, sketch
from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.outputs import floating_outputs, main_output
from numerics_suite.engine.runner import forward_pass
from numerics_suite.engine.true_fp64 import run_true_fp64
from numerics_suite.observations.calls import watched_calls
from numerics_suite.observations.roundoff import rms
from numerics_suite.observations.tokens import token_rows

DECODES_BELOW: Final = 10**9
"""Parameters up to which decoding is asked in true fp64, which reads the whole model once a piece."""

DECODING: Final = "decoding"
DECODED: Final = "decoded.logits"
"""The answer of decoding after a prefill."""

HIDDEN = "hidden"
"""The answer that is kept with pooled logits: the last hidden state."""


@dataclass(slots=True)
class ModuleTrace:
    """One module's states over all batches."""

    given: Sketcher = field(default_factory=Sketcher)
    gave: Sketcher = field(default_factory=Sketcher)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Everything that the true fp64 runs of one cell told.

    Attributes:
        answers: float64 on the CPU, at real tokens, by `BATCH.logits` and so on; of the training batch too.
        modules: by name, in the order in which they first returned.
        gradients: of its loss, in the order of the parameters.
        left_out: "module: op" for what could not be lifted to float64.
        no_gradients: why there are none, empty where there are.
    """

    answers: dict[str, Tensor]
    modules: dict[str, ModuleTrace]
    loss: float
    gradients: tuple[GradientRecord, ...]
    left_out: tuple[str, ...]
    no_gradients: str = ""


def trace(context: CellContext, batches: Sequence[StoredBatch], *, stream: bool | None = None) -> Trace:
    """Run all batches in true fp64, the training batch with gradients.

    Args:
        context: of the cell.
        batches: stored.
        stream: see :func:`numerics_suite.engine.true_fp64.run_true_fp64`.
    """
    answers: dict[str, Tensor] = {}
    modules: dict[str, ModuleTrace] = {}
    left_out: dict[str, None] = {}
    sketches: dict[str, Sketch] = {}
    loss, training = math.nan, training_of(batches)
    no_gradients = _why_no_gradients(context, tensors_of(training, context))

    def take(name: str, gradient: Tensor) -> None:
        with _disable_current_modes():
            sketches[name] = sketch(gradient)

    for batch in batches:
        trains = batch is training
        tensors = tensors_of(batch, context)
        call = trace_call(context, loss=trains)
        with checkpointed(context.model, wanted=trains and not stream) as in_training:
            run = run_true_fp64(
                context.model,
                tensors if trains else context.inputs_in(tensors),
                gradients=trains and not no_gradients,
                stream=stream,
                call=watched(in_training(call), tensors, modules),
                on_gradient=take,
            )
        left_out.update(dict.fromkeys(run.left_out))
        answers |= named_answers(batch, tensors, run.outputs)
        if trains:
            loss = float(run.outputs["loss"])
            sketches |= {name: sketch(gradient) for name, gradient in (run.gradients or {}).items()}
    if decodes(context):
        found, lost = _decoded(context, decoded_batch(batches), modules, stream=stream)
        answers |= found
        left_out.update(dict.fromkeys(lost))
    if sketches:
        # What the loss does not reach has a gradient of zero, and not none.
        sketches = {
            name: sketches.get(name) or nothing(tuple(parameter.shape))
            for name, parameter in context.model.named_parameters()
        }
    return Trace(
        answers=answers,
        modules=modules,
        loss=loss,
        gradients=tuple(GradientRecord(name=name, gradient=found) for name, found in sketches.items()),
        left_out=tuple(left_out),
        no_gradients=no_gradients,
    )


def decodes(context: CellContext) -> bool:
    """Whether decoding with a cache is a use of it, and costs little enough to be asked in true fp64."""
    large = sum(parameter.numel() for parameter in context.model.parameters()) > DECODES_BELOW
    return context.subject.task == "causal-lm" and context.takes_ids and not large


def decoded_batch(batches: Sequence[StoredBatch]) -> StoredBatch:
    """As `generate` is called: padded on the left where that is allowed, and without padding where not."""
    found = next((batch for batch in batches if batch.name == "left"), None)
    if found is not None:
        return found
    first = batches[0]
    length = int(first.tensors["attention_mask"][0].sum()) if "attention_mask" in first.tensors else None
    tensors = {name: array[:1, :length] for name, array in first.tensors.items() if name != "labels"}
    return StoredBatch(name=first.name, tensors=tensors)


def _decoded(
    context: CellContext, batch: StoredBatch, modules: dict[str, ModuleTrace], *, stream: bool | None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The answer of decoding in true fp64, and what could not be lifted; nothing of a model without a cache.

    What remote code does with a cache may fail anyhow; the bits say so, and the rest of the cell is measured all the same.
    """
    tensors = context.inputs_in(tensors_of(batch, context))

    def call(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Tensor]:
        def piece(part: Mapping[str, Any], **words: Any) -> Any:
            width = part["input_ids"].shape[1]
            own = {**part, "attention_mask": part["attention_mask"][:, -width:]}
            return watched(lambda inner, _: call_model(inner, part, **words), own, modules)(model, part)

        return {DECODING: decoded(piece, given, model)}

    before = {
        name: replace(states, given=copy(states.given), gave=copy(states.gave)) for name, states in modules.items()
    }
    try:
        run = run_true_fp64(context.model, tensors, stream=stream, call=call)
    except Exception as error:  # noqa: BLE001 - told by the bits of decoding, which meet it too
        reraise_if_fatal(error)
        modules.clear()
        modules.update(before)
        return {}, ()
    return {DECODED: run.outputs[DECODING].double().cpu()}, run.left_out


def _why_no_gradients(context: CellContext, tensors: Mapping[str, Any]) -> str:
    """Why the loss cannot be differentiated, empty where it can; a quantised model's forward pass has no gradient."""
    if context.subject.quantized:
        return "a quantised checkpoint is not trained"
    if not any(parameter.requires_grad for parameter in context.model.parameters()):
        return "no parameter of this model requires a gradient"
    with torch.enable_grad(), forward_pass(context.condition):
        output = trace_call(context, loss=True)(context.model, tensors)
    assert isinstance(output, dict)
    return "" if output["loss"].requires_grad else "the loss has no gradient"


def answer_records(found: Trace, batches: Sequence[StoredBatch]) -> tuple[AnswerRecord, ...]:
    """The answers as they are stored: not the training batch's, whose states and gradients are sketched."""
    training = training_of(batches) if len(batches) > 1 else None
    records = []
    for name, answer in found.answers.items():
        if training is None or not name.startswith(f"{training.name}."):
            records.append(answer_record(name, answer))
    return tuple(records)


def answer_record(name: str, answer: Tensor) -> AnswerRecord:
    """An answer as it is stored.

    Args:
        name: `BATCH.OUTPUT`.
        answer: `[tokens, width]` float64.
    """
    values, whole, top_values, top_ids = condensed(answer)
    return AnswerRecord(name=name, values=values, whole=whole, top_values=top_values, top_ids=top_ids, rms=rms(answer))


def trace_call(context: CellContext, *, loss: bool) -> Caller:
    """Calls the model so that its answers, and its loss where asked for, are found by name.

    Args:
        context: of the cell.
        loss: also gives the loss; a plain module's without one is the mean square of its main output.
    """
    pooled = context.takes_ids and context.subject.task == "sequence-classification"

    def call(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Any]:
        extra = {"output_hidden_states": True} if pooled else {}
        output = call_model(model, tensors, **extra)
        found = floating_outputs(output)
        name, answer = main_output(found)
        answers: dict[str, Any] = {name: answer}
        if pooled:
            answers[HIDDEN] = output["hidden_states"][-1]
        if loss:
            answers["loss"] = found["loss"] if "loss" in found else answer.square().mean()
        return answers

    return call


def named_answers(batch: StoredBatch, tensors: Mapping[str, Any], outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`[tokens, width]` float64 on the CPU by `BATCH.NAME`; a loss is none of them."""
    real = real_tokens(tensors)
    return {f"{batch.name}.{n}": _rows(v, real).cpu().double() for n, v in outputs.items() if n != "loss"}


def real_rows(tensors: Mapping[str, Any], value: Tensor) -> Tensor:
    """The rows of an answer at real tokens, in its own dtype; all of one that has no tokens."""
    return _rows(value, real_tokens(tensors))


def _rows(value: Tensor, real: Tensor | None) -> Tensor:
    found = None if real is None else token_rows(real, value)
    found = value if found is None else found
    return found.reshape(-1, found.shape[-1]) if found.dim() else found.reshape(1, 1)


# --- states --------------------------------------------------------------------------------------------------------


def watched(call: Caller, tensors: Mapping[str, Any], modules: dict[str, ModuleTrace]) -> Caller:
    """The call with every module's states sketched; only going forward, not where blocks run again for gradients."""
    real = _token_grids(tensors)

    def before(value: Any) -> tuple[Tensor | None, bool]:
        args, kwargs = value
        # A state by name first: what else is returned differs between releases.
        given = (args, kwargs.get("hidden_states"), kwargs)
        state = _state(given, real, copy=True)
        # A dropout's scores have no rows of tokens; unseen, they would make the dropout look like the beginning.
        return (state, True) if state is not None else (_table(given, copy=True), False)

    def after(name: str, taken: tuple[Tensor | None, bool], output: Any) -> None:
        given, by_token = taken
        gave = _state(output, real, root=not name)
        with _disable_current_modes(), torch.no_grad():
            states = modules.setdefault(name, ModuleTrace())
            if given is not None:
                states.given.add(given)
            if gave is None and not by_token:
                gave = _table(output)
            if gave is not None:
                states.gave.add(gave)

    def watching(model: nn.Module, given: Mapping[str, Any]) -> object:
        with watched_calls(model, before, after):
            return call(model, given)

    return watching


def _token_grids(tensors: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Where real tokens are, `[batch, sequence]` each: those of the batch, and a decoder's own of another length."""
    found = [grid for grid in [real_tokens(tensors)] if grid is not None]
    mask, ids = tensors.get("decoder_attention_mask"), tensors.get("decoder_input_ids", tensors.get("labels"))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        found.append(mask.bool().cpu())
    elif isinstance(ids, Tensor) and ids.dim() == 2:
        found.append(torch.ones(ids.shape, dtype=torch.bool))
    return tuple(found)


def _floats(value: Any) -> Iterator[Tensor]:
    """Every floating tensor of more than one dimension in it."""
    for leaf in tree_leaves(value if not hasattr(value, "to_tuple") else value.to_tuple()):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1:
            yield leaf


def _state(value: Any, real: Sequence[Tensor], *, root: bool = False, copy: bool = False) -> Tensor | None:
    """The rows at real tokens of the first floating tensor that has tokens; without tokens, or of rows alone, all of it.

    Args:
        value: what went in or came out.
        real: `[batch, sequence]` each, none for a batch without tokens.
        root: the model itself, whose loss is not its state.
        copy: an op in place may change it later.
    """
    if root:
        found = floating_outputs(value)
        value = main_output(found)[1] if found else None
    with _disable_current_modes(), torch.no_grad():
        for leaf in _floats(value):
            for grid in real or (None,):
                rows = _picked(leaf.detach(), grid)
                if rows is not None:
                    return rows.clone() if copy else rows
    return None


def _table(value: Any, *, copy: bool = False) -> Tensor | None:
    """The first floating tensor, all of it: a rotary table, scores, or what a layout of its own holds."""
    if hasattr(value, "to_tuple"):
        return None
    with _disable_current_modes(), torch.no_grad():
        found = next((leaf.detach() for leaf in _floats(value)), None)
        return found.clone() if copy and found is not None else found


def _picked(leaf: Tensor, real: Tensor | None) -> Tensor | None:
    if real is None:
        return leaf
    if leaf.shape[0] == 1 and leaf.dim() > 2 and real.shape[0] > 1 and leaf.shape[1] == real.shape[1]:
        leaf = leaf.expand(real.shape[0], *leaf.shape[1:])  # the same for each row of the batch
    rows = token_rows(real, leaf)
    if rows is None and leaf.dim() == 2 and leaf.shape[0] == real.shape[0]:
        return leaf  # pooled: one state for each row
    return rows
