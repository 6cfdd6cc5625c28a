"""What users run besides a plain call, in true fp64: padded alone, decoded as `generate` does, saved and loaded, routed.

The tokens are given (teacher forcing), since a greedy choice between two near logits may fall either way by rounding. A
model above a billion parameters is neither decoded nor saved here: both would read or write all of it many times.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from numerics_suite.baselines.batches import LONG, tensors_of, training_of
from numerics_suite.baselines.records import StoredBatch
from numerics_suite.baselines.trace import DECODES_BELOW, ModuleTrace, named_answers, real_rows, trace_call, watched
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.decoding import with_cache
from numerics_suite.engine.digests import tensor_digest
from numerics_suite.engine.outputs import floating_outputs, main_output
from numerics_suite.engine.references import routes, trusted
from numerics_suite.engine.roundtrip import saved_and_loaded
from numerics_suite.engine.router_loss import with_router_loss
from numerics_suite.engine.true_fp64 import run_true_fp64
from numerics_suite.subjects.generation import is_stateful

STEPS: Final = 3
"""Tokens that are decoded after a prompt, or about the edge of a sliding window."""

TRIPS: Final = 2
"""Times that the model is saved and loaded: what a release converts on loading it may convert again on the second."""

PREFIX: Final = "use "
"""What a use is called among the parts that could not be measured."""

BITS: Final = "uses"
"""The part of the bits that holds the uses in the cell's own precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Uses:
    """What the uses of one cell gave.

    Attributes:
        answers: true fp64 on the CPU, at real tokens, by `alone-left.logits`, `generated.logits` and so on.
        modules: states around the modules over all uses, by name.
        left_out: the reason by `use NAME`.
        bits: digest of those that were run in the cell's precision too, empty without one.
    """

    answers: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, ModuleTrace] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    bits: str = ""


def run_uses(context: CellContext, uses: Sequence[StoredBatch], batches: Sequence[StoredBatch]) -> Uses:
    """Run every use that the cell has; one that raises is left out with its reason.

    Args:
        context: of the cell.
        uses: batches of :func:`numerics_suite.baselines.batches.draw_uses`; without any there are no uses.
        batches: those of the plain calls; the roundtrip and the router's loss are asked on the training batch.
    """
    found, raw = Uses(), []
    for name, run, exact in _planned(context, uses, batches) if uses else ():
        kept = copy.deepcopy(found.modules)
        try:
            answers, left_out = exact(found.modules)
            trusted(left_out)
            if run is not None:
                raw.append(run())
            found.answers.update(answers)
        except Exception as error:  # noqa: BLE001 - a release, or code of the checkpoint's own, may refuse a use in any way
            reraise_if_fatal(error)
            found.modules.clear()
            found.modules.update(kept)
            if not isinstance(error, NotApplicableError):
                line = str(error).strip().partition("\n")[0]
                found.left_out[f"{PREFIX}{name}"] = f"{type(error).__name__}: {line}"
    return Uses(
        answers=found.answers,
        modules=found.modules,
        left_out=found.left_out,
        bits=tensor_digest([*raw, *found.answers.values()]) if found.answers else "",
    )


Exact = Callable[[dict[str, ModuleTrace]], tuple[dict[str, Tensor], tuple[str, ...]]]
"""The true fp64 answers by name and what could not be lifted; states go into the dictionary."""

Planned = tuple[str, Callable[[], Tensor] | None, Exact]
"""A use: its name, the run in the cell's precision where that says more, and the true one."""


def _planned(context: CellContext, uses: Sequence[StoredBatch], batches: Sequence[StoredBatch]) -> Iterator[Planned]:
    for batch in uses:
        if batch.name != LONG:
            yield batch.name, partial(_plain, context, batch), partial(_padded, context, batch)
    long = next((batch for batch in uses if batch.name == LONG), None)
    small = sum(parameter.numel() for parameter in context.model.parameters()) <= DECODES_BELOW
    if small and context.subject.task == "causal-lm" and context.family.causal:
        for name, row in (("generated", uses[0]), ("generated-long", long)):
            if row is not None:
                cuts = _cuts(context, row)
                yield name, partial(_decoded, context, row, cuts), partial(_generated, context, name, row, cuts)
    training = tensors_of(training_of(batches), context)
    if small and context.subject.path is not None and not (context.subject.adapter_base or context.subject.quantized):
        first = {name: training[name][:1] for name in ("input_ids", "attention_mask")}
        yield "reloaded", None, partial(_reloaded, context, first if long is None else tensors_of(long, context))
    if routes(context.model) or any("Experts" in type(module).__name__ for module in context.model.modules()):
        yield "router", None, partial(_routed, context, training)


# --- padding ---------------------------------------------------------------------------------------------------------


def _plain(context: CellContext, batch: StoredBatch) -> Tensor:
    tensors = context.inputs_in(tensors_of(batch, context))
    return real_rows(tensors, main_output(floating_outputs(context.run(tensors)))[1])


def _padded(
    context: CellContext, batch: StoredBatch, modules: dict[str, ModuleTrace]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    tensors = tensors_of(batch, context)
    call = watched(trace_call(context, loss=False), tensors, modules)
    run = run_true_fp64(context.model, context.inputs_in(tensors), call=call)
    return named_answers(batch, tensors, run.outputs), run.left_out


# --- decoding --------------------------------------------------------------------------------------------------------


def _cuts(context: CellContext, batch: StoredBatch) -> list[int]:
    """Columns at which a step begins: single ones after a prompt, and one of two tokens across the edge of a window.

    A state that is rolled on token by token is never given several: the class itself says so.
    """
    width = int(batch.tensors["input_ids"].shape[1])
    if batch.name != LONG:
        return list(range(max(width - STEPS, 1), width))
    window = width - STEPS
    return list(range(window - 1, width)) if is_stateful(context.model) else [window - 1, window + 1, window + 2]


def _decoded(context: CellContext, batch: StoredBatch, cuts: Sequence[int]) -> Tensor:
    tensors = context.inputs_in(tensors_of(batch, context))
    logits = context.runner.apply(lambda: with_cache(cuts)(context.model, tensors)["answer"])
    assert isinstance(logits, Tensor)
    return logits[:, cuts[0] :].cpu()[tensors["attention_mask"][:, cuts[0] :].bool().cpu()]


def _generated(
    context: CellContext, name: str, batch: StoredBatch, cuts: Sequence[int], modules: dict[str, ModuleTrace]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    tensors = context.inputs_in(tensors_of(batch, context))
    real, columns = tensors["attention_mask"].bool().cpu(), iter([0, *cuts])

    def step(model: nn.Module, given: Mapping[str, Any], **words: Any) -> Any:
        start, width = next(columns), int(words["input_ids"].shape[1])
        own = {"attention_mask": real[:, start : start + width]}
        return watched(lambda inner, _: call_model(inner, given, **words), own, modules)(model, given)

    run = run_true_fp64(context.model, tensors, call=with_cache(cuts, run=step))
    answer = run.outputs["answer"][:, cuts[0] :].cpu()[real[:, cuts[0] :]]
    return {f"{name}.logits": answer.double()}, run.left_out


# --- files -----------------------------------------------------------------------------------------------------------


def _reloaded(
    context: CellContext, tensors: Mapping[str, Any], modules: dict[str, ModuleTrace]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The answer of the copy that came back from files, at the last tokens of one row: past a window, if there is one."""
    model = context.model
    with tempfile.TemporaryDirectory(prefix="numerics-suite-") as folder:
        for _ in range(TRIPS):
            model = saved_and_loaded(context, model, Path(folder))
    call = watched(trace_call(context, loss=False), tensors, modules)
    run = run_true_fp64(model, context.inputs_in(tensors), call=call)
    name, answer = main_output(run.outputs)
    rows = real_rows(tensors, answer).cpu().double()
    return {f"reloaded.{name}": rows[-STEPS - 1 :]}, run.left_out


# --- the router's loss -----------------------------------------------------------------------------------------------


def _routed(
    context: CellContext, tensors: Mapping[str, Any], _modules: dict[str, ModuleTrace]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The loss that balances experts, asked for whatever the config says, as whoever trains a mixture of them does."""

    def call(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Tensor]:
        losses = {
            name: x for name, x in floating_outputs(call_model(model, given)).items() if name.endswith("aux_loss")
        }
        if not losses:
            reason = "the model returns no loss of its router"
            raise NotApplicableError(reason)
        return losses

    with with_router_loss(context.model):
        run = run_true_fp64(context.model, tensors, call=call)
    return {f"router.{name}": x.cpu().double().reshape(1, 1) for name, x in run.outputs.items()}, run.left_out
