"""Measures the cell like its baseline, once for all four checks, and compares the two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numerics_suite.baselines.compare import Difference, difference
from numerics_suite.baselines.measure import measure_cell
from numerics_suite.baselines.records import CellBaseline
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.request import Request


def difference_of(context: CellContext) -> Difference:
    """Recorded against measured, on the recorded batches with the recorded recipe.

    Args:
        context: the cell; its request holds the baseline.

    Raises:
        NotApplicableError: there is no baseline of the cell.
    """
    return context.cached(_difference)


def _difference(context: CellContext) -> Difference:
    recorded = context.request.baseline
    if recorded is None:
        reason = "no baseline of this cell was given"
        raise NotApplicableError(reason)
    return difference(recorded, measured_as(recorded, context))


def measured_as(recorded: CellBaseline, context: CellContext) -> CellBaseline:
    """The cell measured on the batches and with the recipe of a baseline.

    Args:
        recorded: the baseline.
        context: of the cell.
    """
    asked = _as_recorded(context, recorded.recipe)
    return measure_cell(asked, recorded.batches, context.request.applicable, recorded.uses)


def _as_recorded(context: CellContext, recipe: Mapping[str, Any]) -> CellContext:
    """The context, or one with the recorded seed and training plan; loaded again only where the seed differs."""
    request = _request(context.request, recipe)
    if request == context.request:
        return context
    asked = context.variant(plan=request.plan, seed=request.seed)
    if request.seed == context.request.seed:
        asked.__dict__["loaded"] = context.loaded
    return asked


def _request(request: Request, recipe: Mapping[str, Any]) -> Request:
    """The settings, with the recipe's values in their place."""
    names = ("steps", "optimizer", "lr", "max_grad_norm")
    plan = replace(request.plan, **{name: recipe[name] for name in names if name in recipe})
    return replace(request, plan=plan, seed=recipe.get("seed", request.seed))
