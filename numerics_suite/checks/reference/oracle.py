"""reference.oracle."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from numerics_suite.checks._laws import NO_GRADIENTS
from numerics_suite.checks._true_gradient import GRADIENT, TrueRun, require_sets, true_gradient, true_run
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Fact, Measurement
from numerics_suite.core.registry import check
from numerics_suite.definitions import (
    exact_rotary,
    file_weights,
    oracle_for,
    rotary_boundary,
    rotary_roundoffs,
    run_oracle,
    tensor_weights,
)
from numerics_suite.definitions.run import ANSWER, OracleRun
from numerics_suite.definitions.trace import capture_states, first_difference, table_of, turn_scale
from numerics_suite.definitions.weights import Weights
from numerics_suite.devices.condition import dtype_of
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.digests import batch_key
from numerics_suite.engine.layout import batch_first, sequence_first
from numerics_suite.engine.room import require_block
from numerics_suite.engine.rotary import table_at_length
from numerics_suite.engine.true_fp64 import Fp64Run
from numerics_suite.inputs.strategies import training_batch
from numerics_suite.observations.roundoff import GradientComparison, relative_error

LONGEST_BATCH = 1024
"""Tokens of the batch on the other side of a length that changes the rotary table: attention's float64 scores grow with the
square. Beyond it only the table is judged, whose length costs nothing."""


@check(needs=("token-ids",), reads=(GRADIENT,))
def oracle(context: CellContext) -> Iterable[Measurement]:
    """Does the true fp64 run agree with the family's definition, computed from the checkpoint's own files?

    Logits at all real positions (pooled ones for a classifier), the loss and every parameter's gradient.
    """
    if oracle_for(context.family.name) is None:
        reason = f"no definition of the family '{context.family.name}' is written down; a baseline serves instead"
        raise NotApplicableError(reason)
    require_block(context.model, 1)
    weights = _weights(context)
    # Definition and true fp64 run are the same in every cell that holds the same numbers, if the files are read alike too.
    name = f"definition, weights rounded to {weights.rounding()}, over {batch_key(context.gradient_batch.tensors)}"
    yield from context.true_passes.run(name, lambda: tuple(_measured(context, weights)))


def _measured(context: CellContext, weights: Weights) -> Iterable[Measurement]:
    training = context.gradient_batch.tensors
    other = _length_beyond_boundary(context, _length(training))
    wrong_table = yield from _tables(context, [_length(training), *([] if other is None else [other])])
    run, without = _true_run(context)
    yield from _against_definition(context, weights, run, wrong_table=wrong_table, without=without)
    if other is not None and min(3, context.longest) <= other <= LONGEST_BATCH:
        batch = training_batch(context.space, rows=1, length=other, seed=context.request.seed).tensors
        yield from _against_definition(
            context, weights, true_run(context, batch, gradients=False), wrong_table=wrong_table
        )


def _true_run(context: CellContext) -> tuple[TrueRun, str]:
    """The true fp64 run of the gradient batch; without gradients, and why, where these do not fit."""
    try:
        require_sets(context, 1)
    except NotApplicableError as error:
        return true_run(context, context.gradient_batch.tensors, gradients=False), str(error)
    return true_gradient(context), ""


def _length(batch: Mapping[str, Tensor]) -> int:
    """The sequence length that the rotary embedding uses for the batch."""
    positions = batch.get("position_ids")
    return int(batch["input_ids"].shape[1] if positions is None else positions.max() + 1)


def _length_beyond_boundary(context: CellContext, length: int) -> int | None:
    """A length with another rotary table than `length`; None where one table serves all."""
    boundary = rotary_boundary(context.family.name, _config(context))
    if boundary is None:
        return None
    # A quarter longer, so that a base that grows with the length has grown by more than rounding.
    return boundary + max(1, boundary // 4) if length <= boundary else boundary


def _tables(context: CellContext, lengths: Sequence[int]) -> Generator[Measurement, None, bool]:
    """Measure the rotary table of each length; returns whether one is wrong."""
    wrong = False
    held = context.rotary_table
    for length in lengths if held is not None else ():
        assert held is not None
        table = held[1] if len(lengths) == 1 else table_at_length(context.runner, length)
        assert table is not None
        exact = exact_rotary(context.family.name, _config(context), length)
        roundoffs = rotary_roundoffs(context.family.name, _config(context), table, length)
        yield Measurement(
            name="rotary-excess",
            value=roundoffs / exact.allowed,
            unit="ratio",
            module=held[0].rpartition(".")[0],
            facts={"roundoffs from the exact table": roundoffs}
            | ({"length of the sequence": length} if len(lengths) > 1 else {}),
        )
        wrong = wrong or not roundoffs <= exact.allowed
    return wrong


def _made_in_the_call(context: CellContext, run: TrueRun) -> Generator[Measurement, None, bool]:
    """Measure the table of code that keeps none, or never reads it: the rotation at position 1, in true fp64."""
    table = table_of(run.turn) if run.table is None else None
    if table is None:
        return False
    exact = exact_rotary(context.family.name, _config(context), _length(run.batch))
    roundoffs = rotary_roundoffs(context.family.name, _config(context), table, _length(run.batch))
    facts: dict[str, float | str] = {"roundoffs from the exact table": roundoffs, "table": "made in each call"}
    yield Measurement(
        name="rotary-excess", value=roundoffs / exact.allowed, unit="ratio", module=run.rotary, facts=facts
    )
    return not roundoffs <= exact.allowed


def _against_definition(
    context: CellContext, weights: Weights, run: TrueRun, *, wrong_table: bool, without: str = ""
) -> Iterable[Measurement]:
    wrong_table = (yield from _made_in_the_call(context, run)) or wrong_table
    compared = GradientComparison()
    held = run.found.gradients

    def take(name: str, wanted: Tensor) -> None:
        """Compare a gradient of the definition once it is complete: all of them would take as much memory as the model's."""
        got = None if held is None else held.get(name)
        compared.add(name, None if got is None else got.cpu(), wanted)

    wanted = _definition(context, run, weights, on_gradient=None if held is None else take)
    logits = relative_error(*_compared(run.found, wanted, run.batch))
    loss = relative_error(run.found.outputs["loss"].cpu(), wanted.loss) if wanted.loss is not None else 0.0
    gradient, worst = _worst(compared)
    scale = _scale(context, run)
    where = None
    if not max(logits, loss, gradient) <= AGREED:
        # All that follows from a wrong table is the table's fault.
        wrong = wrong_table or (scale is not None and not scale.value <= AGREED)
        where = run.rotary if wrong else _first_apart(context, run, weights, compared)
    yield from () if scale is None else (scale,)
    facts: dict[str, Fact] = {} if held is None else {"gradient differs by": gradient}
    facts |= {NO_GRADIENTS: without} if without else {}
    yield Measurement(name="true-logits", value=logits, unit="ratio", module=where, facts=facts)
    # A loss that is wrong although its logits are right is the loss's own mistake.
    alone = "wrong-loss" if logits <= AGREED else None
    yield Measurement(name="true-loss", value=loss, unit="ratio", module=where, cause=alone)
    # A wrong forward pass has a wrong gradient too; the gradient is judged where it alone can be wrong.
    if held is not None and max(logits, loss) <= AGREED:
        yield Measurement(
            name="true-gradient",
            value=gradient,
            unit="ratio",
            module=where,
            parameters=(worst,) if worst else (),
            facts=_along(compared, where, worst) if not gradient <= AGREED else {},
        )


def _scale(context: CellContext, run: TrueRun) -> Measurement | None:
    """How far `cos² + sin²` is from the square of the config's scale."""
    if run.turn is None:
        return None
    exact = exact_rotary(context.family.name, _config(context), _length(run.batch)).scale
    ends = turn_scale(run.turn)
    apart = max((abs(end - exact) for end in ends), key=lambda value: (value != value, value))
    facts = {"cosines and sines are scaled by": max(ends, key=lambda end: abs(end - exact)), "config.json says": exact}
    return Measurement(name="rotary-scale", value=apart / exact, unit="ratio", module=run.rotary, facts=facts)


def _config(context: CellContext) -> Mapping[str, Any]:
    """The content of config.json; for a factory, the config of its model."""
    if context.subject.config:
        return context.subject.config
    config = context.model.config.to_dict()  # type: ignore[operator, union-attr]
    assert isinstance(config, dict)
    return config


def _weights(context: CellContext) -> Weights:
    path = context.subject.path
    if path is None or context.subject.adapter_base:
        return tensor_weights({name: value.cpu() for name, value in context.model.state_dict().items()})
    held = {name: parameter.dtype for name, parameter in context.model.named_parameters(remove_duplicate=False)}
    return file_weights(path, rounded_to=dtype_of(context.recipe.parameters), held=held)


def _definition(
    context: CellContext,
    run: TrueRun,
    weights: Weights,
    *,
    on_gradient: Callable[[str, Tensor], None] | None = None,
    trace: bool = False,
) -> OracleRun:
    model = context.model
    head = {name: model.get_parameter(name).detach().cpu() for name in context.loaded.new_head}
    return run_oracle(
        context.family.name,
        _labelled(_config(context), context),
        weights,
        {name: value.cpu() for name, value in run.batch.items()},
        task=context.subject.task,
        inv_freq=run.table,
        rotary=run.rotary,
        head=head or None,
        gradients=on_gradient is not None,
        on_gradient=on_gradient,
        trace=trace,
    )


def _labelled(config: Mapping[str, Any], context: CellContext) -> Mapping[str, Any]:
    """The config with the labels and pad id that the task was loaded with."""
    built = context.model.config
    extra = {
        key: getattr(built, key) for key in ("num_labels", "problem_type") if getattr(built, key, None) is not None
    }
    return {**config, **extra}


def _compared(found: Fp64Run, wanted: OracleRun, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Both logits at real tokens; all rows where they are pooled."""
    got = found.outputs["logits"].cpu()
    if got.dim() < 3:
        return got, wanted.logits
    real = batch["attention_mask"].bool().cpu()
    return got[real], wanted.logits[real]


def _worst(compared: GradientComparison) -> tuple[float, str | None]:
    """The worst gradient error and its parameter; one that only one side has is infinitely wrong."""
    worst, name_of_worst = 0.0, None
    for name, error in compared.errors().items():
        # NaN is the worst there is; a later parameter must not take its place.
        if worst == worst and not error <= worst:
            worst, name_of_worst = error, name
    # A tied weight has one gradient in both, under either of its names; what is missing altogether was detached.
    return (float("inf"), compared.lost[0]) if compared.lost else (worst, name_of_worst)


def _along(compared: GradientComparison, where: str | None, worst: str | None) -> dict[str, Fact]:
    """Projection on the true gradient, ⟨held, true⟩/⟨true, true⟩, where the two first diverge.

    It shows a factor at once, such as a scale applied twice; it is 1 if the difference is orthogonal to the gradient.
    """
    both = list(compared.errors())
    names = [name for name in both if where and name.rpartition(".")[0] == where] or [n for n in both if n == worst]
    ratio = compared.projection(names)
    return {"times the true gradient": float(f"{ratio:.6g}")} if math.isfinite(ratio) else {}


def _first_apart(context: CellContext, run: TrueRun, weights: Weights, compared: GradientComparison) -> str | None:
    """The first block and sub-module where model and definition diverge, forward or else backward."""
    wanted = _definition(context, run, weights, trace=True)
    states: dict[str, Tensor] = {}

    def call(model: Any, tensors: Mapping[str, Any]) -> Any:
        with capture_states(model, wanted.states) as seen:
            output = call_model(model, tensors)
            states.update(seen)
        states[ANSWER] = output["logits"].detach()
        return output

    with torch.no_grad():
        context.runner.true_fp64(run.batch, call=call)
    turned = sequence_first(context.model)
    states = {name: batch_first(value, name, turned) for name, value in states.items()}
    apart = first_difference(states, wanted.states, mask=run.batch["attention_mask"])
    if apart == ANSWER:  # every module is right, and the answer is not what the last of them gave: a wrong pooled row
        return next((name for name in reversed(wanted.states) if name != ANSWER), None)
    if apart is not None or run.found.gradients is None:
        return apart
    return _last_wrong(compared.wrong(AGREED), tuple(wanted.states))


def _last_wrong(parameters: Iterable[str], order: tuple[str, ...]) -> str | None:
    """Where the forward pass is right: the last module, in the order of computation, with a wrong gradient.

    The backward pass starts from the other end, so it went wrong there first; all modules before it inherit the error.
    """
    wrong = [name.rpartition(".")[0] for name in parameters]
    places = {name.removesuffix(":input"): index for index, name in enumerate(order)}

    def place(module: str) -> int:
        # A module that the trace does not hold stands where its parent does.
        while module and module not in places:
            module = module.rpartition(".")[0]
        return places.get(module, -1)

    return max(wrong, key=place) if wrong else None
