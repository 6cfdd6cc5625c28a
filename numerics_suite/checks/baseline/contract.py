"""baseline.contract."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.baselines.measurements import contract_measurements
from numerics_suite.checks.baseline._difference import difference_of
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext


@check(runs_on_nonfinite=True)
def contract(context: CellContext) -> Iterable[Measurement]:
    """Is everything still there that callers rely on and that the baseline watched?"""
    return contract_measurements(difference_of(context))
