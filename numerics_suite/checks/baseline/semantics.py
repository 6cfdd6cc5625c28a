"""baseline.semantics."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.baselines.measurements import semantic_measurements
from numerics_suite.checks.baseline._difference import difference_of
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext


@check(runs_on_nonfinite=True)
def semantics(context: CellContext) -> Iterable[Measurement]:
    """Does the model compute the function that was recorded, once rounding is out of the way?"""
    return semantic_measurements(difference_of(context))
