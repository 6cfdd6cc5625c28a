"""How long does `numerics-suite --help` take, and does it stay under 0.3 s?"""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

MOST_SECONDS = 0.3
"""What a person does not notice; importing torch alone takes several times as long."""


def test_help(benchmark: BenchmarkFixture) -> None:
    """A fresh interpreter each time; the best of ten, so that other programs' work does not count."""
    command = [sys.executable, "-m", "numerics_suite", "--help"]

    def run() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603 - our own

    text = benchmark.pedantic(run, rounds=10, warmup_rounds=1)
    assert "check" in text
    assert benchmark.stats is not None
    assert benchmark.stats.stats.min < MOST_SECONDS
