"""baseline.training."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.baselines.measurements import training_measurements
from numerics_suite.checks.baseline._difference import difference_of
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext


@check(trains=True, runs_on_nonfinite=True)
def training(context: CellContext) -> Iterable[Measurement]:
    """Does training take the recorded course, in float64 exactly and in the precision as far as rounding allows?"""
    measurements = list(training_measurements(difference_of(context)))
    if not measurements:
        reason = "the baseline has no training curve of this cell"
        raise NotApplicableError(reason)
    return measurements
