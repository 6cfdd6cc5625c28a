"""Batches that are drawn once are those that Hypothesis draws for each check, and a failing one is made smaller as it does."""

from __future__ import annotations

import importlib
import random
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis.errors import Flaky

from numerics_suite.core.records import Batch
from numerics_suite.inputs.vocabulary import InputSpace
from numerics_suite.suite.draws import Draw, ask_of_each, passing_batches

DRAW = Draw(
    space=InputSpace(vocab_size=50, pad_id=0, max_length=12), pad_inside=False, seed=3, max_examples=20, seeks=False
)


class TooLongError(Exception):
    """Raised of a long batch."""


def asked(draw: Draw, longest: int, *, by_hypothesis: bool) -> list[tuple[str, float]]:
    """Each batch that is asked about, with a number of Python's generator, where batches with longer rows fail."""
    seen: list[tuple[str, float]] = []

    def test(batch: Batch) -> None:
        seen.append((batch.drawn, random.random()))
        if batch.tensors["input_ids"].shape[1] > longest:
            raise TooLongError

    with suppress(TooLongError):
        if by_hypothesis:
            draw.run(test)
        else:
            ask_of_each(draw, test)
    return seen


def test_a_seed_draws_the_same_batches_whatever_modules_are_loaded(tmp_path, monkeypatch) -> None:
    wide = replace(DRAW, space=replace(DRAW.space, max_length=4000), max_examples=200)

    def drawn() -> list[str]:
        seen: list[str] = []
        wide.run(lambda batch: seen.append(batch.drawn))
        return seen

    before = drawn()
    (tmp_path / "of_a_user.py").write_text("SIZES = [1201, 1301, 1409, 1511, 1601, 1709, 1801, 1901]")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("of_a_user")
    assert drawn() == before


@pytest.mark.parametrize("longest", [12, 10, 4, 0], ids=["none-fails", "one-fails", "many-fail", "all-fail"])
@pytest.mark.parametrize("pad_inside", [False, True])
def test_the_same_batches_in_the_same_order_as_by_hypothesis(longest: int, pad_inside: bool) -> None:
    draw = replace(DRAW, pad_inside=pad_inside)
    once = asked(draw, longest, by_hypothesis=False)
    assert once == asked(draw, longest, by_hypothesis=True)
    assert (len(once) == 20) == (longest == 12)


def test_the_exception_of_the_smallest_batch_is_raised() -> None:
    def test(batch: Batch) -> None:
        if batch.tensors["input_ids"].shape[1] > 4:
            raise TooLongError(batch.drawn)

    with pytest.raises(TooLongError, match=r"lengths=\[5\]"):
        ask_of_each(DRAW, test)


def test_what_a_model_writes_to_its_batch_no_other_check_sees() -> None:
    ask_of_each(DRAW, lambda batch: batch.tensors["input_ids"].zero_())
    assert any(batch.tensors["input_ids"].any() for batch in passing_batches(DRAW))


def test_a_failure_that_does_not_come_again_is_still_seen() -> None:
    failed: list[str] = []

    def once(batch: Batch) -> None:
        if not failed and batch.tensors["input_ids"].shape[1] > 4:
            failed.append(batch.drawn)
            raise TooLongError

    with pytest.raises(Flaky):
        ask_of_each(DRAW, once)
