"""Bisection: it finds the boundary, asks nothing twice, and knows what it could not ask."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numerics_suite.versions.search import EndError, ItemVerdict, search

GOOD, BAD, UNTESTABLE = ItemVerdict.GOOD, ItemVerdict.BAD, ItemVerdict.UNTESTABLE


@st.composite
def histories(draw: st.DrawFn, *, monotone: bool = True) -> list[ItemVerdict]:
    """Answers of a list whose first is good and whose last is bad."""
    count = draw(st.integers(2, 80))
    first_bad = draw(st.integers(1, count - 1))
    history = [GOOD if index < first_bad else BAD for index in range(count)]
    for index in draw(st.sets(st.integers(1, count - 1))) if count > 2 else ():
        if index != count - 1:
            history[index] = UNTESTABLE if monotone else draw(st.sampled_from(ItemVerdict))
    return history


def asked(history: list[ItemVerdict]):
    questions: list[int] = []

    def ask(index: int) -> ItemVerdict:
        questions.append(index)
        return history[index]

    return search(range(len(history)), ask), questions


@given(histories())
def test_the_boundary_of_one_change(history):
    found, questions = asked(history)
    low, high = found.last_good, found.first_bad
    assert (history[low], history[high]) == (GOOD, BAD)
    assert BAD not in history[:high]
    assert GOOD not in history[low + 1 :]
    assert all(history[index] is UNTESTABLE for index in found.between)
    assert list(found.between) == list(range(low + 1, high))
    assert len(questions) == len(set(questions))
    assert {index: history[index] for index in questions} == dict(found.answers)
    skipped = sum(history[index] is UNTESTABLE for index in questions)
    assert len(questions) <= 2 + math.ceil(math.log2(max(len(history) - 1, 1))) + 2 * skipped


@given(histories(monotone=False))
def test_any_history_gives_a_true_boundary(history):
    """With several changes it is one of them, never a place where nothing changes."""
    found, questions = asked(history)
    assert (history[found.last_good], history[found.first_bad]) == (GOOD, BAD)
    assert found.last_good < found.first_bad
    assert all(history[index] is UNTESTABLE and index in questions for index in found.between)


def test_forty_versions_take_eight_questions():
    for first_bad in range(1, 40):
        found, questions = asked([GOOD] * first_bad + [BAD] * (40 - first_bad))
        assert (found.last_good, found.first_bad, found.between) == (first_bad - 1, first_bad, ())
        assert len(questions) <= 8


@pytest.mark.parametrize(
    ("history", "end", "answer", "count"),
    [
        ([GOOD, BAD, GOOD], "bad", GOOD, 1),
        ([GOOD, BAD, UNTESTABLE], "bad", UNTESTABLE, 1),
        ([BAD, GOOD, BAD], "good", BAD, 2),
        ([UNTESTABLE, BAD], "good", UNTESTABLE, 2),
    ],
)
def test_an_end_that_does_not_hold(history, end, answer, count):
    questions = []
    with pytest.raises(EndError) as raised:
        search(range(len(history)), lambda index: questions.append(index) or history[index])
    assert (raised.value.end, raised.value.answer, len(questions)) == (end, answer, count)


@pytest.mark.parametrize("items", [[], [1]])
def test_a_search_needs_two_ends(items):
    with pytest.raises(ValueError, match="needs two ends"):
        search(items, lambda _: GOOD)
