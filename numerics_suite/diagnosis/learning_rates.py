"""The largest learning rate that holds, by decades and then by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from numerics_suite.engine.training_loop import TrainingPlan

LOWEST = -8
HIGHEST = {"sgd": 2}
"""Exponents of the decades that are searched; an Adam, whose step of each element is about the rate, is searched up to 1."""

DECADES = 4
BISECTIONS = 3


def learning_rates(plan: TrainingPlan, holds: Callable[[TrainingPlan], bool]) -> float | None:
    """The largest stable learning rate at or below the plan's, to within a factor of 1.4; None without one."""
    good, bad = None, plan.lr
    for decade in range(1, DECADES + 1):
        lr = plan.lr / 10**decade
        if holds(replace(plan, lr=lr)):
            good = lr
            break
        bad = lr
    if good is None:
        return None
    return between_rates(plan, good, bad, holds)


def largest_stable_rate(plan: TrainingPlan, holds: Callable[[TrainingPlan], bool]) -> tuple[float | None, bool]:
    """The largest stable learning rate whatever the plan's, to within a factor of 1.4, and whether it is the highest that was tried.

    The decades are searched from the highest downwards. Upwards from the plan's rate the search ends where a rate is too small to show: in bfloat16
    the loss of a run at 6e-7 falls or rises by its rounding. A decade counts where the one below it holds too, since a few wild steps may end below
    the first loss by luck; if there is none such, the highest that holds.

    Returns:
        None and False without any.
    """
    held: dict[int, bool] = {}

    def stable(exponent: int) -> bool:
        if exponent not in held:
            held[exponent] = holds(replace(plan, lr=10.0**exponent))
        return held[exponent]

    top = HIGHEST.get(plan.optimizer, 0)
    decades = range(top, LOWEST - 1, -1)
    found = next((each for each in decades if stable(each) and (each == LOWEST or stable(each - 1))), None)
    found = next((each for each in decades if stable(each)), None) if found is None else found
    if found is None or found == top:
        return None if found is None else 10.0**top, found == top
    return between_rates(plan, 10.0**found, 10.0 ** (found + 1), holds), False


def between_rates(plan: TrainingPlan, good: float, bad: float, holds: Callable[[TrainingPlan], bool]) -> float:
    """The largest learning rate that holds, by bisection of the logarithm.

    Args:
        plan: of everything else.
        good: a rate that holds.
        bad: one that does not, a decade away at most.
        holds: trains with a plan and says whether that is stable.
    """
    for _ in range(BISECTIONS):
        middle = math.sqrt(good * bad)
        good, bad = (middle, bad) if holds(replace(plan, lr=middle)) else (good, middle)
    return good
