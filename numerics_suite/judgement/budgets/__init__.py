"""Every budget of the suite, as data; one file per group of checks. Another package's checks bring their own."""

from __future__ import annotations

from functools import cache

from numerics_suite.core.records import Budget
from numerics_suite.core.registry import added_check, own_check_ids
from numerics_suite.judgement.budgets import baseline, forward, inputs, load, reference, train


@cache
def all_budgets() -> dict[tuple[str, str], Budget]:
    """Our budgets by check id and measurement name."""
    rows = (*load.BUDGETS, *inputs.BUDGETS, *forward.BUDGETS, *reference.BUDGETS, *train.BUDGETS, *baseline.BUDGETS)
    table = {(row.check, row.measurement): row for row in rows}
    if len(table) != len(rows):
        message = "two budgets judge the same measurement"
        raise AssertionError(message)
    return table


def budgets_of(check: str) -> dict[str, Budget]:
    """The budgets of one check by measurement name; none for a check that is not installed.

    Raises:
        BadInputError: another package's check, which cannot be used.
    """
    if check in own_check_ids():
        return {name: budget for (owner, name), budget in all_budgets().items() if owner == check}
    added = added_check(check)
    return {} if added is None else {budget.measurement: budget for budget in added.budgets}
