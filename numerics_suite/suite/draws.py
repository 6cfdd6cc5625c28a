"""The batches that Hypothesis draws for a check, and its search for a smaller one that fails.

As long as no batch fails, the seed alone decides what is drawn, so the batches are drawn once for all checks and cells
of a process: for a tiny model that costs as much as a pass. Hypothesis itself runs where a batch fails, or where a check
seeks.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import count
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase, given

from numerics_suite.core.attributes import with_attribute
from numerics_suite.core.records import Batch
from numerics_suite.devices import random_state
from numerics_suite.inputs.strategies import batches
from numerics_suite.inputs.vocabulary import InputSpace

Test = Callable[[Batch], None]
"""Raises where the batch fails."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What decides which batches Hypothesis draws.

    Attributes:
        space: what may be drawn.
        pad_inside: some batches hold a pad id among real tokens.
        seed: `--seed`.
        max_examples: the most batches, before one fails.
        seeks: the check tells Hypothesis a number to maximise, which then decides too.
    """

    space: InputSpace
    pad_inside: bool
    seed: int
    max_examples: int
    seeks: bool

    def run(self, test: Test) -> None:
        """Call `test` with each batch, and once it raises with smaller ones; raises what the smallest one does."""

        @hypothesis.seed(self.seed)
        @hypothesis.settings(
            max_examples=self.max_examples,
            database=None,
            deadline=None,
            derandomize=False,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.generate, Phase.target, Phase.shrink) if self.seeks else (Phase.generate, Phase.shrink),
        )
        @given(batch=batches(self.space, pad_inside=self.pad_inside))
        def each(batch: Batch) -> None:
            test(batch)

        with _without_local_constants():
            each()


@contextmanager
def _without_local_constants() -> Iterator[None]:
    """Within it Hypothesis draws no integers that it reads in the user's own modules, as newer releases of it would.

    With those a seed draws other batches beside other modules: 46 of 300 seeds did beside a module of eight constants.
    """
    providers: Any = sys.modules.get("hypothesis.internal.conjecture.providers")
    if not hasattr(providers, "_get_local_constants"):
        yield
        return
    with (
        with_attribute(providers, "_get_local_constants", providers.Constants),
        with_attribute(providers, "CONSTANTS_CACHE", _own_cache(providers)),
    ):
        yield


@cache
def _own_cache(providers: Any) -> Any:
    """A cache of what may be drawn where, beside that of the user's own tests."""
    return type(providers.CONSTANTS_CACHE)(providers.CONSTANTS_CACHE.max_size)


@lru_cache(maxsize=32)
def passing_batches(draw: Draw) -> tuple[Batch, ...]:
    """The batches of a draw in which none fails."""
    found: list[Batch] = []
    draw.run(found.append)
    return tuple(found)


def ask_of_each(draw: Draw, test: Test) -> None:
    """Call `test` as :meth:`Draw.run` does, and draw only where that must be."""
    if draw.seeks:
        draw.run(test)
        return
    passed = 0
    for batch in passing_batches(draw):
        # A model may write to what it is given. Hypothesis seeds Python's generators with 0 for each batch too.
        own = replace(batch, tensors={name: tensor.clone() for name, tensor in batch.tensors.items()})
        try:
            with random_state.python_seeded(0):
                test(own)
        except Exception as error:  # noqa: BLE001 - of the model's own code too
            failure = error
            break
        passed += 1
    else:
        return
    draw.run(_known_until(passed, failure, test))


def _known_until(passed: int, failure: Exception, test: Test) -> Test:
    """The test of a run from the beginning that asks nothing twice: so many batches pass, and the next one fails."""
    calls = count()

    def known(batch: Batch) -> None:
        call = next(calls)
        if call == passed:
            raise failure
        if call > passed:
            test(batch)

    return known
