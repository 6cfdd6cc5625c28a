"""reference.oracle."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.devices.condition import dtype_of
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.evidence import Evidence
from numerics_suite.engine.references import trusted
from numerics_suite.engine.true_fp64 import Fp64Run
from numerics_suite.observing.roundoff import gradient_errors, relative_error
from numerics_suite.oracles import file_weights, oracle_for, rotary_budget, rotary_roundoffs, run_oracle, tensor_weights
from numerics_suite.oracles.run import ANSWER, OracleRun
from numerics_suite.oracles.trace import capture_states, first_difference
from numerics_suite.oracles.weights import Weights


@check(needs=("token-ids",))
def oracle(evidence: Evidence) -> Iterable[Measurement]:
    """Is the true fp64 run what the family's definition computes from the checkpoint's own files?

    Logits at all real positions (pooled ones for a classifier), the loss and every parameter's gradient.
    """
    if oracle_for(evidence.family.name) is None:
        reason = f"no definition of the family '{evidence.family.name}' is written down; a baseline serves instead"
        raise NotApplicableError(reason)
    table = evidence.rotary_table
    wrong_table = None
    if table is not None:
        roundoffs = rotary_roundoffs(evidence.family.name, _config(evidence), table[1])
        yield Measurement(
            name="rotary-excess",
            value=roundoffs / rotary_budget(evidence.family.name, _config(evidence)),
            unit="ratio",
            module=table[0].rpartition(".")[0],
            facts={"roundoffs from the exact table": roundoffs},
        )
        if not roundoffs <= rotary_budget(evidence.family.name, _config(evidence)):
            wrong_table = table[0].rpartition(".")[0]
    weights = _weights(evidence)
    batch = evidence.training_batch.tensors
    wanted = _definition(evidence, batch, weights, table, gradients=True)
    found = evidence.runner.true_fp64(batch, gradients=True)
    trusted(found.left_out)
    logits = relative_error(*_compared(found, wanted, batch))
    loss = relative_error(found.outputs["loss"].cpu(), wanted.loss) if wanted.loss is not None else 0.0
    gradient, worst = _gradients(found, wanted)
    where = None
    if not max(logits, loss, gradient) <= AGREED:
        # All that follows from a wrong table is the table's fault.
        where = wrong_table or _first_apart(evidence, batch, weights, table, found, wanted)
    yield Measurement(
        name="true-logits", value=logits, unit="ratio", module=where, facts={"gradient differs by": gradient}
    )
    # A loss that is wrong although its logits are right is the loss's own mistake.
    alone = "wrong-loss" if logits <= AGREED else None
    yield Measurement(name="true-loss", value=loss, unit="ratio", module=where, cause=alone)
    # A wrong forward pass has a wrong gradient too; the gradient is judged where it alone can be wrong.
    if max(logits, loss) <= AGREED:
        yield Measurement(
            name="true-gradient", value=gradient, unit="ratio", module=where, parameters=(worst,) if worst else ()
        )


def _config(evidence: Evidence) -> Mapping[str, Any]:
    """The file's words where there is a file; what a factory built its model from elsewhere."""
    if evidence.subject.config:
        return evidence.subject.config
    config = evidence.model.config.to_dict()  # type: ignore[operator, union-attr]
    assert isinstance(config, dict)
    return config


def _weights(evidence: Evidence) -> Weights:
    path = evidence.subject.path
    if path is None or evidence.subject.adapter_base:
        return tensor_weights({name: value.cpu() for name, value in evidence.model.state_dict().items()})
    return file_weights(path, rounded_to=dtype_of(evidence.recipe.parameters))


def _definition(  # noqa: PLR0913 - what the oracle needs
    evidence: Evidence,
    batch: Mapping[str, Tensor],
    weights: Weights,
    table: tuple[str, Tensor] | None,
    *,
    gradients: bool = False,
    trace: bool = False,
) -> OracleRun:
    model = evidence.model
    head = {name: model.get_parameter(name).detach().cpu() for name in evidence.loaded.new_head}
    return run_oracle(
        evidence.family.name,
        _labelled(_config(evidence), evidence),
        weights,
        {name: value.cpu() for name, value in batch.items()},
        task=evidence.subject.task,
        inv_freq=table[1].double() if table is not None else None,
        head=head or None,
        gradients=gradients,
        trace=trace,
    )


def _labelled(config: Mapping[str, Any], evidence: Evidence) -> Mapping[str, Any]:
    """The config with the labels and pad id that the task was loaded with."""
    built = evidence.model.config
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


def _gradients(found: Fp64Run, wanted: OracleRun) -> tuple[float, str | None]:
    """The worst gradient error and its parameter; one that only one side knows is infinitely wrong."""
    assert found.gradients is not None
    worst, name_of_worst = 0.0, None
    on_cpu = {name: gradient.cpu() for name, gradient in found.gradients.items()}
    for name, error in gradient_errors(on_cpu, wanted.gradients).items():
        # NaN is the worst there is; a later parameter must not take its place.
        if worst == worst and not error <= worst:
            worst, name_of_worst = error, name
    # A tied weight has one gradient in both, under either of its names; what is missing altogether was detached.
    lost = [name for name, g in wanted.gradients.items() if name not in found.gradients and bool(g.any())]
    return (float("inf"), lost[0]) if lost else (worst, name_of_worst)


def _first_apart(  # noqa: PLR0913, PLR0917 - both runs and what they were made of
    evidence: Evidence,
    batch: Mapping[str, Tensor],
    weights: Weights,
    table: tuple[str, Tensor] | None,
    gradients: Fp64Run,
    wanted_gradients: OracleRun,
) -> str | None:
    """The first block and sub-module where the model and its definition part, forward or else backward."""
    wanted = _definition(evidence, batch, weights, table, trace=True)
    states: dict[str, Tensor] = {}

    def call(model: Any, tensors: Mapping[str, Any]) -> Any:
        with capture_states(model, wanted.states) as seen:
            output = call_model(model, tensors)
            states.update(seen)
        states[ANSWER] = output["logits"].detach()
        return output

    with torch.no_grad():
        evidence.runner.true_fp64(batch, call=call)
    apart = first_difference(states, wanted.states, mask=batch["attention_mask"])
    if apart == ANSWER:  # every module is right, and the answer is not what the last of them gave: a wrong pooled row
        return next((name for name in reversed(wanted.states) if name != ANSWER), None)
    return apart or _last_wrong(gradients, wanted_gradients, tuple(wanted.states))


def _last_wrong(found: Fp64Run, wanted: OracleRun, order: tuple[str, ...]) -> str | None:
    """Where the forward pass is right: the last module, in the order of computation, with a wrong gradient.

    The backward pass comes from the other end, so that is where it went wrong first; all before it inherit the error.
    """
    assert found.gradients is not None
    wrong = [
        name.rpartition(".")[0]
        for name, gradient in wanted.gradients.items()
        if not _agrees(found.gradients.get(name), gradient)
    ]
    places = {name.removesuffix(":input"): index for index, name in enumerate(order)}

    def place(module: str) -> int:
        # A module that the trace does not hold stands where its parent does.
        while module and module not in places:
            module = module.rpartition(".")[0]
        return places.get(module, -1)

    return max(wrong, key=place) if wrong else None


def _agrees(found: Tensor | None, wanted: Tensor) -> bool:
    if found is None:
        return not bool(wanted.any())
    return relative_error(found.cpu(), wanted) <= AGREED
