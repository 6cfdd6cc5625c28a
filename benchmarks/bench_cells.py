"""What does the verdict on one cell cost, in training steps of the same model?

`pytest -p no:numerics_suite -s benchmarks/bench_cells.py`, with the extra `test` installed. The unit is a bare bfloat16 step
(forward, backward, AdamW; 4 rows of 64 tokens) of the same model in the same process, timed after the checks: CPU seconds
on one thread, so that other work on the machine weighs on both. Peaks are those of processes of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from measurements import measure, show, write_model

from numerics_suite.core.errors import BadInputError
from numerics_suite.subjects.fixtures import REAL_NAME, fixture_path

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

MODELS = {
    "35M": {},
    "0.9B": {
        "hidden_size": 1536,
        "intermediate_size": 5120,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "head_dim": 96,
        "vocab_size": 32768,
    },
}
"""What the configs have beside :data:`measurements.MEDIUM`. The large one is a tenth of GLM-4-9B."""


@pytest.fixture(params=["tiny", "35M", "135M", "0.9B"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A shipped fixture, models with weights of one seed, and the trained one."""
    name = request.param
    if name == "0.9B" and name not in request.config.option.keyword:
        pytest.skip("large: ask for it with -k 0.9B")
    if name == "tiny":
        return "fixture:glm4-tiny"
    if name == "135M":
        try:
            fixture_path(REAL_NAME)
        except BadInputError as error:
            pytest.skip(str(error))
        return f"fixture:{REAL_NAME}"
    return write_model(tmp_path / name, MODELS[name])


def test_cell(benchmark: BenchmarkFixture, subject: str) -> None:
    """The figures are in the benchmark's extra info."""
    found = benchmark.pedantic(measure, args=(subject,), rounds=1)
    show(benchmark, subject, found)
    assert found["cell"] > 0
