"""How long do a forward pass and a training step of a tiny GLM-4 take in each precision, bare and watched?

`pytest -p no:numerics_suite benchmarks/bench_steps.py`, with the extra `test` installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from measurements import bare_step, context_of

from numerics_suite.devices.precisions import PRECISIONS
from numerics_suite.engine.training_loop import TrainingPlan

if TYPE_CHECKING:
    from collections.abc import Callable

    from pytest_benchmark.fixture import BenchmarkFixture

    from numerics_suite.engine.cell_context import CellContext

RUNS_ON_CPU = [name for name, recipe in PRECISIONS.items() if not recipe.tf32]
TRAINS = [name for name in RUNS_ON_CPU if PRECISIONS[name].trains]


@pytest.mark.parametrize("precision", RUNS_ON_CPU)
def test_forward_pass(benchmark: BenchmarkFixture, precision: str) -> None:
    """One forward pass without gradients, as the checks run it."""
    context = context_of(precision)
    tensors = context.training_batch.tensors
    logits = benchmark(lambda: context.run(tensors)).logits
    assert logits.shape[:2] == tensors["input_ids"].shape


def _watched_step(context: CellContext) -> Callable[[], object]:
    """The step as `train.*` takes it: every loss, gradient, parameter and optimizer state is asked for non-finite values."""
    trainer = context.trainer(TrainingPlan())

    def step() -> object:
        trainer.step(len(trainer.norms) + 1)
        return trainer.losses[-1]

    return step


@pytest.mark.parametrize("kind", ["bare", "watched"])
@pytest.mark.parametrize("precision", TRAINS)
def test_training_step(benchmark: BenchmarkFixture, precision: str, kind: str) -> None:
    """One optimizer step, bare and watched side by side."""
    if precision == "pure-fp16":
        pytest.skip("AdamW's eps is 0 in float16, so its second step has no parameters left to time")
    context = context_of(precision)
    loss = benchmark(_watched_step(context) if kind == "watched" else bare_step(context))
    assert loss == loss
