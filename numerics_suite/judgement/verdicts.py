"""A measurement against its budget: within, or a breach."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from numerics_suite.core.errors import CheckError
from numerics_suite.core.extensions import OWN_NAME
from numerics_suite.core.records import Budget, Measurement, Series
from numerics_suite.judgement.budgets import budgets_of
from numerics_suite.settings.choices import CAUSES


@dataclass(frozen=True, slots=True, kw_only=True)
class Breach:
    """A measurement over its budget."""

    measurement: Measurement
    budget: Budget

    @property
    def excess(self) -> float:
        """How far over, as a ratio; infinite over a limit of 0 or for a value that is not finite."""
        value, limit = self.measurement.value, self.budget.limit
        if limit == 0 or not math.isfinite(value):
            return math.inf
        return value / limit


def within(value: float, limit: float) -> bool:
    """Whether the value is within the limit; NaN never is."""
    return value <= limit


def is_cause(cause: str, check: str) -> bool:
    """Whether a check may give that cause: one of the contract, or one of its own package's.

    Args:
        cause: of a budget or a measurement.
        check: id of the check, such as `acme.logit-range`, whose package names its causes `acme.…`.
    """
    return cause in CAUSES or (bool(OWN_NAME.fullmatch(cause)) and cause.partition(".")[0] == check.partition(".")[0])


def judge(check: str, measurements: Iterable[Measurement], budgets: Mapping[str, Budget] | None = None) -> list[Breach]:
    """The breaches among the measurements, worst first.

    Raises:
        CheckError: no measurement has a budget: nothing was judged, which is not passing. Or it gives a cause that nobody
            knows.
    """
    table = budgets_of(check) if budgets is None else budgets
    judged = 0
    breaches = []
    for measurement in measurements:
        budget = table.get(measurement.name)
        if budget is None:
            continue
        judged += 1
        if measurement.cause is not None and not is_cause(measurement.cause, check):
            message = (
                f"{check} gives the cause '{measurement.cause}', which is neither the suite's nor its own package's"
            )
            raise CheckError(message)
        if not within(measurement.value, budget.limit):
            breaches.append(Breach(measurement=measurement, budget=budget))
    if judged == 0:
        message = f"{check} measured nothing that a budget judges"
        raise CheckError(message)
    return sorted(breaches, key=lambda breach: -breach.excess)


def with_limits(check: str, series: Series, budgets: Mapping[str, Budget] | None = None) -> Series:
    """The series with the limit of each point."""
    table = budgets_of(check) if budgets is None else budgets
    found = (table.get(name) for name in series.budgets)
    return replace(series, limits=tuple(None if budget is None else budget.limit for budget in found))
