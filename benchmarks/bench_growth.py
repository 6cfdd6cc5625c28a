"""How does the cost of a cell grow with parameters, layers, vocabulary, length, rows and batches?

`pytest -p no:numerics_suite -s benchmarks/bench_growth.py`, with the extra `test` installed. One curve changes one thing of a GLM-4 of 5 million
parameters, in a process of its own for each point. Each line has the CPU seconds of the cell and of a bare step over the same rows and
length, their ratio, and the whole forward passes of the cell, which are counted. `train.trainer` is left out: it is asked once a subject.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from measurements import alone, cell, write_model

from numerics_suite.engine.request import Request

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

SMALL = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 4096,
}

CURVES: dict[str, dict[int, dict[str, Any]]] = {
    "hidden size": {
        hidden: {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": hidden // 64}
        for hidden in (256, 512, 768)
    },
    "layers": {layers: {"num_hidden_layers": layers} for layers in (4, 8, 16)},
    "vocabulary": {words: {"vocab_size": words} for words in (4096, 16384, 65536)},
    "length": {length: {"seq_len": length} for length in (64, 128, 256)},
    "rows": {rows: {"batch_size": rows} for rows in (4, 8, 16)},
    "batches": {batches: {"max_examples": batches} for batches in (2, 5, 10)},
}
"""Changes of the config or options of the command, for each value of what a curve is about."""


def measure(folder: Path, changes: dict[str, Any]) -> dict[str, float]:
    """Figures of one point.

    Args:
        folder: for the checkpoint.
        changes: of the config, or options of the command.
    """
    given = {name: value for name, value in changes.items() if name in {"seq_len", "batch_size", "max_examples"}}
    subject = write_model(folder, {**SMALL, **{name: value for name, value in changes.items() if name not in given}})
    request = Request(rows=given.get("batch_size", 4), length=given.get("seq_len", 64))
    found = alone(
        cell, subject, {**{name: str(value) for name, value in given.items()}, "skip": "train.trainer"}, request
    )
    return {"cell_s": found["cell"] * found["step_s"], **found}


@pytest.mark.parametrize("curve", CURVES)
def test_growth(benchmark: BenchmarkFixture, tmp_path: Path, curve: str) -> None:
    """The figures of each point are in the benchmark's extra info."""

    def points() -> dict[int, dict[str, float]]:
        return {value: measure(tmp_path / str(value), changes) for value, changes in CURVES[curve].items()}

    found = benchmark.pedantic(points, rounds=1)
    benchmark.extra_info.update({str(value): figures for value, figures in found.items()})
    for value, figures in found.items():
        print(f"\n{curve} {value}: " + ", ".join(f"{name} {one:.3g}" for name, one in figures.items()))
    assert all(figures["cell"] > 0 for figures in found.values())
