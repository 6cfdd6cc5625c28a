"""The largest stable learning rate is where training stops being stable, wherever the search was asked to begin."""

from __future__ import annotations

import math

import pytest

from numerics_suite.diagnosis.learning_rates import HIGHEST, largest_stable_rate
from numerics_suite.engine.training_loop import TrainingPlan

TOO_SMALL = 2e-6
"""Below it the loss of a bfloat16 run rises or falls by its rounding."""


def narrow_run(edge):
    """Stable up to the edge, and at rates too small to show in one decade of two."""
    return lambda plan: plan.lr <= edge and (plan.lr > TOO_SMALL or round(math.log10(plan.lr)) % 2 == 0)


@pytest.mark.parametrize("edge", [3e-5, 4.2e-3, 0.13, 0.99])
def test_it_does_not_depend_on_the_rate_that_was_asked(edge):
    found = {largest_stable_rate(TrainingPlan(lr=lr), narrow_run(edge)) for lr in (6e-7, 1e-4, 3e-2, 5.0)}
    ((rate, at_least),) = found
    assert edge / 1.4 <= rate <= edge
    assert not at_least


def test_the_highest_rate_that_is_tried_is_told_as_at_least():
    assert largest_stable_rate(TrainingPlan(), lambda _: True) == (1.0, True)
    assert largest_stable_rate(TrainingPlan(optimizer="sgd"), lambda _: True) == (10.0 ** HIGHEST["sgd"], True)


def test_a_wild_run_that_ends_low_by_luck_is_passed_over():
    rate, at_least = largest_stable_rate(TrainingPlan(), lambda plan: plan.lr <= 2e-3 or plan.lr == 1.0)
    assert 2e-3 / 1.4 <= rate <= 2e-3
    assert not at_least


def test_one_decade_alone_and_none():
    rate, _ = largest_stable_rate(TrainingPlan(), lambda plan: 5e-6 < plan.lr < 2e-5)
    assert 2e-5 / 1.4 <= rate <= 2e-5
    assert largest_stable_rate(TrainingPlan(), lambda _: False) == (None, False)


def test_the_rates_of_a_search_are_few():
    asked = []
    largest_stable_rate(TrainingPlan(lr=5e-5), lambda plan: asked.append(plan.lr) or plan.lr <= 2e-2)
    assert len(asked) == len(set(asked)) == 7
