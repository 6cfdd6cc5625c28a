"""train.checkpointing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from numerics_suite.checks._true_gradient import GRADIENT, require_sets, true_gradient
from numerics_suite.checks.train._other_ways import agreement, in_training_mode
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.exact import AGREED
from numerics_suite.core.numbers import nan_last
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.references import trusted
from numerics_suite.engine.true_fp64 import run_true_fp64
from numerics_suite.observations.roundoff import gradient_errors


@check(trains=True, needs=("token-ids",), reads=(GRADIENT,))
def checkpointing(context: CellContext) -> Iterable[Measurement]:
    """Are gradients the same with and without activation checkpointing, and in training mode and eval mode?

    Both in true fp64, with every dropout off.
    """
    if not getattr(context.model, "supports_gradient_checkpointing", False):
        reason = "this model class supports no gradient checkpointing"
        raise NotApplicableError(reason)
    require_sets(context, 1)
    if (found := agreement(context)) is not None:
        yield _measurement("true-training-mode", found.gradient, found.parameter)
        yield _measurement("true-gradient", found.gradient, found.parameter)
        yield Measurement(name="lost", value=0, unit="parameters")
        return
    require_sets(context, 3)  # parameters and gradients of one run, gradients of the other
    evaluated = _in_eval_mode(context)
    plain = _trained(context, checkpointed=False)
    by_mode = _worst("true-training-mode", plain, evaluated)
    yield by_mode
    if by_mode.value <= AGREED:
        # One function: with checkpointing it is compared with what is held anyway, and a third set of gradients is dropped.
        plain = evaluated
    again = _trained(context, checkpointed=True)
    lost = tuple(name for name in plain if name not in again)
    yield _worst("true-gradient", again, {name: value for name, value in plain.items() if name in again})
    yield Measurement(
        name="lost",
        value=len(lost),
        unit="parameters",
        parameters=lost,
        module=lost[0].rpartition(".")[0] if lost else None,
    )


def _in_eval_mode(context: CellContext) -> Mapping[str, Tensor]:
    """The cell's true fp64 gradients; for a large model whose blocks cannot be streamed, those of a separate run."""
    try:
        return true_gradient(context).gradients
    except NotApplicableError:
        run = run_true_fp64(context.model, context.gradient_batch.tensors, gradients=True, stream=False)
        trusted(run.left_out)
        assert run.gradients is not None
        return run.gradients


def _trained(context: CellContext, *, checkpointed: bool) -> Mapping[str, Tensor]:
    """The true fp64 gradients in training mode, without dropout."""
    call = in_training_mode(checkpointed=checkpointed)
    run = context.runner.true_fp64(context.gradient_batch.tensors, gradients=True, stream=False, call=call)
    trusted(run.left_out)
    assert run.gradients is not None
    return run.gradients


def _worst(name: str, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Measurement:
    """The error of the parameter whose gradient is worst; a missing one is infinitely wrong."""
    errors = {**dict.fromkeys(wanted, float("inf")), **gradient_errors(got, wanted)}
    worst = max(errors, key=lambda name: nan_last(errors[name]))
    return _measurement(name, errors[worst], worst)


def _measurement(name: str, error: float, parameter: str) -> Measurement:
    module = parameter.rpartition(".")[0]
    return Measurement(name=name, value=error, unit="ratio", module=module, parameters=(parameter,))
