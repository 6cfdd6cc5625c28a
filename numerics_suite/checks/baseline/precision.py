"""baseline.precision."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.baselines.measurements import precision_measurements
from numerics_suite.checks.baseline._difference import difference_of
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext


@check(runs_on_nonfinite=True)
def precision(context: CellContext) -> Iterable[Measurement]:
    """Is the error of the precision no larger than what was recorded, as a whole and in each module?"""
    return precision_measurements(difference_of(context))
