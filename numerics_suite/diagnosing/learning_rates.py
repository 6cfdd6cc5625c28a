"""The largest learning rate that holds, by decades and then by bisection."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from numerics_suite.engine.training_loop import Plan

DECADES = 4
BISECTIONS = 3


def learning_rates(plan: Plan, holds: Callable[[Plan], bool]) -> float | None:
    """The largest stable learning rate at or below the plan's, to within a factor of 1.4; None without one.

    Args:
        plan: as asked.
        holds: trains with a plan and says whether that is stable.
    """
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


def between_rates(plan: Plan, good: float, bad: float, holds: Callable[[Plan], bool]) -> float:
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
