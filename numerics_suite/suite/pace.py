"""How long what is left of a run will take: by what the same checks took before, and by what was expected of the others."""

from __future__ import annotations

import time
from collections.abc import Mapping

TRUST = 0.02
"""Of all that is expected: as much is counted as if it had taken just that, so that the first cheap checks do not decide alone."""


class Pace:
    """Compares what answers took with what was expected of them."""

    def __init__(self, expected: Mapping[str, float], workers: int = 0) -> None:
        """Nothing is answered yet of what is expected, in seconds by question; 0 workers are this process."""
        self._open = dict(expected)
        self._prior = TRUST * sum(expected.values())
        self._expected = self._took = 0.0
        self._by_check: dict[str, tuple[float, float]] = {}
        self._workers, self._begun = max(workers, 1), time.monotonic()

    def answered(self, question: str, seconds: float) -> None:
        """An answer is there; one that was not open, as an answer of an earlier run, changes nothing."""
        expected = self._open.pop(question, None)
        if expected is None:
            return
        self._expected += expected
        self._took += seconds
        check = question.partition("/")[0]
        before, took = self._by_check.get(check, (0.0, 0.0))
        self._by_check[check] = before + expected, took + seconds

    def left(self) -> float:
        """Seconds until the last question is answered."""
        ratio = (self._took + self._prior) / max(self._expected + self._prior, 1e-9)
        work = 0.0
        for question, expected in self._open.items():
            before, took = self._by_check.get(question.partition("/")[0], (0.0, 0.0))
            work += expected * (took / before if before else ratio)
        return work / self._side_by_side()

    def _side_by_side(self) -> float:
        """Questions that are answered at a time: workers share cores, wait for each other and run out of cells."""
        elapsed = time.monotonic() - self._begun
        if self._workers == 1 or not self._took or elapsed < 1.0:
            return float(self._workers)
        return min(max(self._took / elapsed, 1.0), float(self._workers))
