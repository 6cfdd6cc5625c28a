"""forward.deterministic."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.core.records import Batch, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.outputs import floating_outputs
from numerics_suite.observations.comparison import differing_elements
from numerics_suite.observations.repeatability import unsteady_module
from numerics_suite.observations.roundoff import relative_error

MOVED = "moved"
"""Fact: by how much the second output differs, relative to the root mean square of the first."""


@check(batches=True)
def deterministic(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Does the same input give the same bits twice, in eval mode?"""
    wanted = context.forward(batch)
    tensors = context.inputs_of(batch)
    again = floating_outputs(context.run(tensors))
    differing = sum(differing_elements(again[name], value) for name, value in wanted.items())
    where = unsteady_module(context.model, lambda: context.run(tensors)) if differing else None
    moved = (
        max(relative_error(again[name].double(), value.double()) for name, value in wanted.items())
        if differing
        else 0.0
    )
    facts = {MOVED: moved} if differing else {}
    yield Measurement(name="differing", value=differing, unit="elements", module=where, facts=facts)
