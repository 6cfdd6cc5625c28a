"""train.checkpointing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.numbers import nan_last
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.dropout import WithoutDropout
from numerics_suite.engine.evidence import Evidence
from numerics_suite.engine.references import trusted
from numerics_suite.engine.true_fp64 import Fp64Run, run_true_fp64
from numerics_suite.observing.roundoff import gradient_errors


@check(trains=True, needs=("token-ids",))
def checkpointing(evidence: Evidence) -> Iterable[Measurement]:
    """Are the gradients with activation checkpointing those without, and those of training mode eval mode's?

    Both in true fp64, with every dropout off.
    """
    if not getattr(evidence.model, "supports_gradient_checkpointing", False):
        reason = "this model class supports no gradient checkpointing"
        raise NotApplicableError(reason)
    tensors = evidence.training_batch.tensors
    plain = run_true_fp64(evidence.model, tensors, gradients=True, stream=False, call=_training_call())
    trusted(plain.left_out)
    yield _by_mode(evidence, tensors, plain)
    model = evidence.copy_model()
    # The recomputation runs within the backward pass, beyond the call that turns dropout off.
    options = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), WithoutDropout())}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)  # type: ignore[operator]
    again = run_true_fp64(model, tensors, gradients=True, stream=False, call=_training_call())
    trusted(again.left_out)
    assert plain.gradients is not None
    assert again.gradients is not None
    lost = tuple(name for name in plain.gradients if name not in again.gradients)
    errors = gradient_errors(again.gradients, plain.gradients)
    worst = max(errors, key=lambda name: nan_last(errors[name]))
    yield Measurement(
        name="true-gradient",
        value=errors[worst],
        unit="ratio",
        module=worst.rpartition(".")[0],
        parameters=(worst,),
    )
    yield Measurement(
        name="lost",
        value=len(lost),
        unit="parameters",
        parameters=lost,
        module=lost[0].rpartition(".")[0] if lost else None,
    )


def _by_mode(evidence: Evidence, tensors: Mapping[str, Tensor], training: Fp64Run) -> Measurement:
    """Loss and gradients of training mode without dropout against eval mode: they are one function."""
    evaluated = run_true_fp64(evidence.model, tensors, gradients=True, stream=False)
    assert evaluated.gradients is not None
    assert training.gradients is not None
    errors = {
        **dict.fromkeys(evaluated.gradients, float("inf")),
        **gradient_errors(training.gradients, evaluated.gradients),
    }
    worst = max(errors, key=lambda name: nan_last(errors[name]))
    return Measurement(
        name="true-training-mode",
        value=errors[worst],
        unit="ratio",
        module=worst.rpartition(".")[0],
        parameters=(worst,),
    )


def _training_call() -> Any:
    """Calls the model in training mode, where checkpointing is on, with every dropout off."""

    def call(model: nn.Module, tensors: Mapping[str, Tensor]) -> Any:
        model.train()
        with WithoutDropout():
            return call_model(model, tensors)

    return call
