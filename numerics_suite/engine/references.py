"""A cell's references: the true fp64 run, the rounded run, and the output on which laws are checked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Batch
from numerics_suite.devices.condition import dtype_of
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.digests import batch_key
from numerics_suite.engine.layout import STATES, batch_first, sequence_first
from numerics_suite.engine.runner import Caller, Runner
from numerics_suite.engine.true_passes import Form, beside
from numerics_suite.observations.roundoff import relative_error, rms

Answer = Callable[..., Tensor]
""":func:`true_answer` or :func:`rounded_answer`."""

TRUE = "fp64"
"""The condition of the true fp64 run."""

NUMBER = re.compile(r"\d+")


def _read(
    context: CellContext,
    condition: str,
    tensors: Mapping[str, Any],
    compute: Callable[[], Tensor],
    *,
    own: bool = False,
) -> Tensor:
    """The answer of a pass from the cell's store; all but the true fp64 run compute in the cell's own dtype."""
    batch = batch_key(tensors)
    lasting = _is_planned(context, batch)
    if condition.startswith(TRUE):
        form = _form(condition, tensors)
        return context.true_passes.read((condition, batch), form, compute, lasting=lasting, own=own)
    narrow = dtype_of(context.recipe.computes_in)
    return context.passes.read((condition, batch), compute, narrow, lasting=lasting)


def _form(condition: str, tensors: Mapping[str, Any]) -> Form:
    """What decides which way a call takes through the masks of an attention.

    The kind of the call without its numbers, what is handed over, one row or several, on which sides rows have padding, and the order
    of magnitude of the width: kernels drop a mask that hides nothing, and take others for one row, one query or a window.
    """
    ids, mask = tensors.get("input_ids"), tensors.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return Form((condition, batch_key(tensors)))
    real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    sides = None if real is None else frozenset(tuple(row.unique_consecutive().tolist()) for row in real)
    rows, width = ids.shape
    return Form((NUMBER.sub("n", condition), tuple(sorted(tensors)), rows > 1, sides, width.bit_length()), real)


def _is_planned(context: CellContext, key: tuple[Any, ...]) -> bool:
    """Whether the key is that of a batch which every check examines."""
    return any(key == batch_key(context.inputs_of(batch)) for batch in context.planned_batches)


def true_pass(
    context: CellContext, tensors: Mapping[str, Any], call: Caller, name: str, *, own: bool = False
) -> Tensor:
    """The output of a true fp64 pass made by a custom call of the model, float64 on the CPU.

    Args:
        context: the cell.
        tensors: inputs of the call.
        call: gives an output `answer`.
        name: of the call; equal calls share a name.
        own: under the cell's own attention, whatever another one gave.

    Raises:
        NotApplicableError: something could not be lifted to float64; such a run is no reference.
    """

    def make() -> Tensor:
        run = context.runner.true_fp64(tensors, call=call)
        trusted(run.left_out)
        return run.outputs["answer"].cpu()

    return _read(context, f"{TRUE} {name}", tensors, make, own=own)


def without_labels(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The batch without its labels: laws apply to logits."""
    return {name: value for name, value in tensors.items() if name != "labels"}


def refuse_without_ids(context: CellContext) -> None:
    """Leave out a plain module that wraps no language model: its batch has no token ids.

    Raises:
        NotApplicableError: it does not.
    """
    if not context.takes_ids and "input_ids" not in context.training_batch.tensors:
        reason = "a plain module takes no token ids"
        raise NotApplicableError(reason)


def turned_states(context: CellContext) -> frozenset[str]:
    """Where the cell's model holds states as `[sequence, batch, …]`; see :func:`numerics_suite.engine.layout.sequence_first`."""
    return context.cached(_turned_states)


def _turned_states(context: CellContext) -> frozenset[str]:
    return sequence_first(context.model, output_hidden_states=True)


def answer_of(output: Any, *, by_token: bool, turned: frozenset[str] = frozenset()) -> Tensor:
    """What a law compares: the logits; the last hidden state where a law is about tokens and the logits are pooled.

    Args:
        output: of the model.
        by_token: the law needs one row per token, `[batch, sequence, …]`.
        turned: of :func:`turned_states`.
    """
    logits = output["logits"] if "logits" in output else output[0]
    if by_token and logits.dim() < 3:
        states = output["hidden_states"][-1]
        assert isinstance(states, Tensor)
        return batch_first(states, STATES, turned)
    assert isinstance(logits, Tensor)
    return logits


def reads_states(context: CellContext, *, by_token: bool) -> bool:
    """Whether a law compares states, since the logits are pooled and the law is about tokens."""
    return by_token and context.subject.task == "sequence-classification"


def caller(context: CellContext, *, by_token: bool, **keywords: Any) -> Caller:
    """Calls a model so that :func:`answer_of` finds its answer."""
    pooled = reads_states(context, by_token=by_token)
    turned = turned_states(context) if pooled else frozenset()

    def call(model: nn.Module, tensors: Mapping[str, Any]) -> Any:
        extra = {"output_hidden_states": True} if pooled else {}
        output = call_model(model, tensors, **extra, **keywords)
        return {"answer": answer_of(output, by_token=by_token, turned=turned)}

    return call


def true_answer(
    context: CellContext, tensors: Mapping[str, Any], *, by_token: bool = True, own: bool = False
) -> Tensor:
    """The answer of the true fp64 run, float64 on the CPU.

    Args:
        context: the cell.
        tensors: of the batch.
        by_token: see :func:`answer_of`.
        own: see :func:`true_pass`.

    Raises:
        NotApplicableError: something could not be lifted to float64; such a run is no reference.
    """
    call = caller(context, by_token=by_token)
    states = reads_states(context, by_token=by_token)
    return true_pass(context, without_labels(tensors), call, f"states: {states}", own=own)


def answer_under(context: CellContext, other: nn.Module, attn: str | None, tensors: Mapping[str, Any]) -> Tensor:
    """The true fp64 answer of the cell's subject under another attention; a cell of that attention reads it too.

    Args:
        context: the cell.
        other: its model under the other attention.
        attn: that attention; None where the two models hold other numbers, so that nothing may be read by another cell.
        tensors: of the batch.

    Raises:
        NotApplicableError: something could not be lifted to float64; such a run is no reference.
    """
    given = without_labels(tensors)
    states = reads_states(context, by_token=True)

    def make() -> Tensor:
        run = Runner(other, context.condition).true_fp64(given, call=caller(context, by_token=True))
        trusted(run.left_out)
        return run.outputs["answer"].cpu()

    if attn is None or context.shared is None:
        return make()
    batch, store = batch_key(given), beside(context.true_passes, attn)
    return store.answers.read((f"{TRUE} states: {states}", batch), make, lasting=_is_planned(context, batch))


def trusted(left_out: tuple[str, ...]) -> None:
    """Refuse a reference run that was not wholly lifted.

    Raises:
        NotApplicableError: naming what was left out.
    """
    if left_out:
        raise NotApplicableError(no_reference(left_out))


def no_reference(left_out: Sequence[str], *, kind: str = "float64") -> str:
    """Why there is no true fp64 run, or no rounded one.

    Args:
        left_out: "module: op" of what could not be lifted.
        kind: which reference: "float64" or "rounded".
    """
    return f"no {kind} reference: {', '.join(left_out[:3])} cannot be computed in float64"


def rounded_answer(context: CellContext, tensors: Mapping[str, Any], *, by_token: bool = True) -> Tensor:
    """The output of the rounded run, float64 on the CPU: every op exact and rounded once.

    Raises:
        NotApplicableError: an op could not be computed in float64; the reason names it.
    """
    given = without_labels(tensors)

    def make() -> Tensor:
        run = context.runner.rounded(given, call=caller(context, by_token=by_token))
        if run.left_out:
            raise NotApplicableError(no_reference(run.left_out, kind="rounded"))
        return run.outputs["answer"].cpu()

    return _read(context, f"rounded, states: {reads_states(context, by_token=by_token)}", given, make)


def agreeing(moved: Tensor, *sources: Callable[[Answer], Tensor]) -> tuple[Tensor, Callable[[], Tensor]]:
    """The true output, and a function for the rounded one, of the first source that agrees in true fp64.

    The passes over a whole batch exist anyway. Only where a law's own output differs from theirs must the suite find
    out why: a neighbour in the batch, or the change that the law is about. So single rows come last.

    Args:
        moved: true fp64 answer of the transformed batch.
        sources: each maps a way to answer to outputs at the same positions; the cheapest first.
    """
    for source in sources:
        true, chosen = source(true_answer), source
        if relative_error(moved, true) <= AGREED:
            break
    return true, lambda: chosen(rounded_answer)


def plain_answer(context: CellContext, tensors: Mapping[str, Any], *, by_token: bool = True) -> Tensor:
    """The answer of the cell itself in its own precision, float64 on the CPU."""
    given = without_labels(tensors)

    def make() -> Tensor:
        if _is_planned(context, batch_key(given)) and not reads_states(context, by_token=by_token):
            outputs = context.forward(Batch(tensors=given, drawn=""))  # which checks of a plain call have run already
            if "logits" in outputs:
                return outputs["logits"]
        call = caller(context, by_token=by_token)
        answer: Tensor = context.runner.apply(lambda: call(context.model, given)["answer"])
        return answer

    return _read(context, f"plain, states: {reads_states(context, by_token=by_token)}", given, make)


def is_reference_itself(context: CellContext) -> bool:
    """In fp64 the run is its own reference: it has no inherent error to compare with."""
    return context.recipe.computes_in == "float64"


def longest_reduction(model: nn.Module) -> int:
    """The longest sum in a matrix product of the model: the largest fan-in of its linear layers.

    GPT-2's Conv1D holds its weight as `[in, out]`; experts hold theirs stacked, in either order.
    """
    fans = [m.in_features for m in model.modules() if isinstance(m, nn.Linear)]
    fans += [int(m.weight.shape[0]) for m in model.modules() if type(m).__name__ == "Conv1D"]  # type: ignore[index]
    fans += [max(p.shape[1:]) for p in model.parameters() if p.dim() > 2]
    return max(fans, default=1)


def routes(model: nn.Module) -> bool:
    """Whether the model picks experts by rank: rounding may swap two, and the output jumps."""
    return any("experts" in name.split(".") for name, _ in model.named_modules())


def routed_reason() -> str:
    """Why a mixture of experts has no inherent error to compare with."""
    return "a mixture of experts: rounding may swap two experts of near rank, and the answer jumps"


def rounding_allowance(context: CellContext, tokens: int = 0) -> float:
    """By how much a kernel's error may exceed one rounding per op, before any multiple.

    In 16 bits kernels accumulate in float32, so a product is rounded once: 1. In float32 they accumulate in float32
    too: a sum of K products errs by up to about sqrt(K) roundoffs (Higham & Mary 2019, probabilistic bound).

    Args:
        context: the cell.
        tokens: of the batch, which a weight's gradient sums over; 0 for a forward pass.
    """
    if context.recipe.computes_in in {"float32", "float64"} and not context.recipe.tf32:
        return math.sqrt(max(longest_reduction(context.model), tokens))
    return 1.0


def compare_law(
    context: CellContext, *, true: Tensor, true_other: Tensor, other: Tensor, base: Callable[[], Tensor]
) -> tuple[float, float, str]:
    """Judge a law twice: in true fp64, and in the cell's precision.

    The first half applies even where there is no rounded run, or no inherent error to compare with: then the second
    half requires only that no value becomes non-finite in the precision.

    Args:
        context: the cell.
        true: true fp64 answer of the batch, at the positions that the law compares.
        true_other: true fp64 answer of the transformed batch at the same positions.
        other: the cell's own answer of the transformed batch at the same positions.
        base: gives the rounded answer of the batch at the same positions.

    Returns:
        `max|a - b| / rms` in true fp64, and the error of the transformed run in units of the inherent error. By the
        triangle inequality a law that holds in true fp64 can fail in p only through a transformed run that is itself
        too far from the true one, so that is what is measured. The third is why there is no rounded run, naming the op;
        "" where the error was measured.
    """
    exact = relative_error(true_other, true)
    # The law in true fp64 says all; a value that is lost in p only must still be seen.
    lost = 0.0 if bool(other.isfinite().all()) or not bool(true.isfinite().all()) else math.nan
    if is_reference_itself(context) or routes(context.model):
        return exact, lost, ""
    try:
        inherent = rms(base() - true)
    except NotApplicableError as error:
        return exact, lost, str(error)
    floor = torch.finfo(dtype_of(context.recipe.computes_in)).eps / 2 * rms(true)
    return exact, rms(other - true) / (max(inherent, floor) * rounding_allowance(context)), ""
