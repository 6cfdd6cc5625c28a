"""The cell measured as its baseline was, once for all four checks, and compared with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numerics_suite.baselines.compare import Difference, difference
from numerics_suite.baselines.measure import measure_cell
from numerics_suite.baselines.records import CellBaseline
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.engine.cell_context import CellContext, Request

MEMO = "baseline.difference"


def difference_of(evidence: CellContext) -> Difference:
    """Recorded against measured, on the recorded batches with the recorded recipe.

    Args:
        evidence: of a cell; its request holds the baseline.

    Raises:
        NotApplicableError: there is no baseline of the cell.
    """
    recorded = evidence.request.baseline
    if recorded is None:
        reason = "no baseline of this cell was given"
        raise NotApplicableError(reason)
    if MEMO not in evidence.memo:
        evidence.memo[MEMO] = difference(recorded, measured_as(recorded, evidence))
    found = evidence.memo[MEMO]
    assert isinstance(found, Difference)
    return found


def measured_as(recorded: CellBaseline, evidence: CellContext) -> CellBaseline:
    """The cell measured on the batches and with the recipe of a baseline.

    Args:
        recorded: the baseline.
        evidence: of the cell.
    """
    asked = _as_recorded(evidence, recorded.recipe)
    return measure_cell(asked, recorded.batches, evidence.request.applicable, recorded.uses)


def _as_recorded(evidence: CellContext, recipe: Mapping[str, Any]) -> CellContext:
    """The evidence, or one with the recorded seed and training plan; loaded again only where the seed differs."""
    request = _request(evidence.request, recipe)
    if request == evidence.request:
        return evidence
    asked = evidence.variant(plan=request.plan, seed=request.seed)
    if request.seed == evidence.request.seed:
        asked.__dict__["loaded"] = evidence.loaded
    return asked


def _request(request: Request, recipe: Mapping[str, Any]) -> Request:
    """What the settings ask, with what the recipe says instead."""
    names = ("steps", "optimizer", "lr", "max_grad_norm")
    plan = replace(request.plan, **{name: recipe[name] for name in names if name in recipe})
    return replace(request, plan=plan, seed=recipe.get("seed", request.seed))
