"""The float64 gradient of a cell: computed once and read by the definition, the reference, accumulation and checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn

from numerics_suite.core.exact import AGREED
from numerics_suite.definitions.trace import TURN, capture_states
from numerics_suite.devices import memory
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.digests import batch_key
from numerics_suite.engine.references import trusted
from numerics_suite.engine.room import require_gradient_sets
from numerics_suite.engine.rotary import rotary_table
from numerics_suite.engine.true_fp64 import Fp64Run
from numerics_suite.engine.true_passes import gradient_bytes, keeps_gradients
from numerics_suite.observations.roundoff import gradient_errors, relative_error
from numerics_suite.subjects.memory import KEPT_GRADIENT_BYTES

GRADIENT = "true fp64 gradient"
"""Name under which checks declare that they read it, so that a large model's is dropped after the last of them."""

ROOM_BESIDE = 8
"""Sets of gradients that must fit beside the one that is kept: more than training in float32 and every comparison take."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueRun:
    """A true fp64 run of one batch, with the rotary table it used: some scalings compute it in each run.

    Attributes:
        batch: its input.
        found: its result.
        rotary: module path of the rotary embedding, None where there is none.
        table: the frequencies that this run read out of the model, float64; None where it read none.
        turn: cosines and sines as complex numbers; None in a layout that is not known.
    """

    batch: Mapping[str, Any]
    found: Fp64Run
    rotary: str | None
    table: Tensor | None
    turn: Tensor | None

    @property
    def gradients(self) -> Mapping[str, Tensor]:
        """Of the loss, by parameter name, float64: read by several checks, so no check may write to them."""
        assert self.found.gradients is not None
        return self.found.gradients


def true_gradient(context: CellContext) -> TrueRun:
    """The true fp64 run of the cell's gradient batch, forward and backward, in eval mode.

    Raises:
        NotApplicableError: something could not be lifted to float64; such a run is no reference.
    """
    if context.shared is not None and not keeps_gradients(context.model):
        context.shared.drop(GRADIENT, but=context.true_passes)  # one large set at a time
    tensors = context.gradient_batch.tensors
    return kept_run(context, "whole batch", lambda: true_run(context, tensors, gradients=True), agree=_same)


def _same(one: TrueRun, other: TrueRun) -> bool:
    """Whether two runs give the same loss, and every gradient of the other."""
    if one.gradients.keys() != other.gradients.keys():
        return False
    loss = relative_error(one.found.outputs["loss"].cpu(), other.found.outputs["loss"].cpu())
    return all(error <= AGREED for error in (loss, *gradient_errors(one.gradients, other.gradients).values()))


def kept_run(
    context: CellContext,
    name: str,
    compute: Callable[[], Result],
    agree: Callable[[Result, Result], bool] | None = None,
) -> Result:
    """A true fp64 run over the gradient batch in eval mode: computed once a cell, and once for cells with equal numbers.

    Args:
        context: the cell.
        name: of the run; equal runs share a name.
        compute: runs it, if it is not kept.
        agree: compares two results; of a large model only such a result outlives the cell.
    """
    key = f"{GRADIENT}: {name} over {batch_key(context.gradient_batch.tensors)}"
    outlives = agree is not None and (key in context.true_passes.runs or _outlives(context))
    if outlives or keeps_gradients(context.model):
        found: Result = context.true_passes.run(key, compute, agree)
        return found
    if key not in context.gradient_passes:
        context.gradient_passes[key] = compute()
    kept: Result = context.gradient_passes[key]
    return kept


def _outlives(context: CellContext) -> bool:
    """Whether later cells may read the gradients of a large model: where they take no room that a check would be refused for."""
    needed = gradient_bytes(context.model)
    if context.shared is None or needed > KEPT_GRADIENT_BYTES:
        return False
    return memory.free_bytes(context.cell.device) > ROOM_BESIDE * needed


def require_sets(context: CellContext, sets: float) -> None:
    """Refuse a check that holds float64 gradients of all parameters so many times at once, where these do not fit.

    Raises:
        NotApplicableError: with the bytes needed and free.
    """
    kept = (*context.gradient_passes, *context.true_passes.runs)
    held = any(str(key).startswith(f"{GRADIENT}: whole batch") for key in kept)
    require_gradient_sets(context, sets, held=held)


def after_reading(context: CellContext, *, last: bool, last_of_all: bool) -> None:
    """Hand memory back to the system after a check that read the true gradient of a large model.

    What passes over a large model leave is more than the allocator returns on its own.

    Args:
        context: the cell, which holds a large model.
        last: no later check of the cell reads it; if one does, it is computed again.
        last_of_all: no check of a later cell does either.
    """
    if last:
        context.gradient_passes.clear()
    if last_of_all and context.shared is not None:
        context.shared.drop(GRADIENT)
    memory.release(context.cell.device)


def true_run(context: CellContext, batch: Mapping[str, Any], *, gradients: bool) -> TrueRun:
    """A true fp64 run with the rotary table it used.

    Raises:
        NotApplicableError: something could not be lifted to float64; such a run is no reference.
    """
    path, held = _rotary_module(context), context.rotary_table
    seen: dict[str, Tensor] = {}

    def call(model: nn.Module, tensors: Mapping[str, Any]) -> Any:
        with capture_states(model, [f"{path}{TURN}"]) as states:
            output = call_model(model, tensors)
        seen.update(states)
        if held is not None and (table := rotary_table(model)) is not None:
            seen["table"] = table[1]
        return output

    found = context.runner.true_fp64(batch, gradients=gradients, call=call)
    trusted(found.left_out)
    turn, table = seen.get(f"{path}{TURN}"), seen.get("table")
    return TrueRun(batch=batch, found=found, rotary=path, table=table, turn=turn)


def _rotary_module(context: CellContext) -> str | None:
    """Path of the rotary embedding: the module whose table is read, else the one of that class."""
    if context.rotary_table is not None:
        return context.rotary_table[0].rpartition(".")[0]
    kinds = {name: context.family.kind_of(type(module).__name__) for name, module in context.model.named_modules()}
    return next((name for name, kind in kinds.items() if kind == "rotary"), None)
