"""Between which two neighbours does the answer change? Bisection over any ordered list, some of which cannot be asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

Item = TypeVar("Item")


class ItemVerdict(Enum):
    """What asking one item gave."""

    GOOD = "good"
    BAD = "bad"
    UNTESTABLE = "untestable"


class EndError(Exception):
    """An end of the list is not what it was said to be.

    Attributes:
        end: `good` for the first item, `bad` for the last.
        answer: what it gave.
    """

    def __init__(self, end: str, answer: ItemVerdict) -> None:
        """Which end, and what it gave."""
        super().__init__(f"the {end} end is {answer.value}")
        self.end, self.answer = end, answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary(Generic[Item]):
    """Where the answer changes.

    Attributes:
        last_good: good; every item after it up to `first_bad` is untestable.
        first_bad: bad.
        between: the untestable items between the two, in their order.
        answers: index to answer of everything that was asked.
    """

    last_good: Item
    first_bad: Item
    between: tuple[Item, ...]
    answers: Mapping[int, ItemVerdict]


def search(items: Sequence[Item], ask: Callable[[Item], ItemVerdict]) -> Boundary[Item]:
    """Find two items, one good and one bad, with nothing but untestable ones between; each is asked at most once.

    The last item is asked first, then the first one. With one change in the list and no untestable item it takes
    `ceil(log2(n - 1))` questions besides these two; an untestable one costs itself and may move the middle.

    Args:
        items: at least two, the good end first.
        ask: what an item is.

    Raises:
        EndError: an end is not what it was said to be.
        ValueError: fewer than two items.
    """
    if len(items) < 2:
        message = f"a search needs two ends, and there are {len(items)} items"
        raise ValueError(message)
    answers: dict[int, ItemVerdict] = {}

    def answer(index: int) -> ItemVerdict:
        answers[index] = ask(items[index])
        return answers[index]

    low, high = 0, len(items) - 1
    for end, index, wanted in (("bad", high, ItemVerdict.BAD), ("good", low, ItemVerdict.GOOD)):
        if answer(index) is not wanted:
            raise EndError(end, answers[index])
    while (middle := _middle(low, high, answers)) is not None:
        given = answer(middle)
        if given is ItemVerdict.GOOD:
            low = middle
        elif given is ItemVerdict.BAD:
            high = middle
    return Boundary(last_good=items[low], first_bad=items[high], between=tuple(items[low + 1 : high]), answers=answers)


def _middle(low: int, high: int, answers: Mapping[int, ItemVerdict]) -> int | None:
    """The index nearest the middle that was not asked yet, None where all were."""
    middle = (low + high) // 2
    left = [index for index in range(low + 1, high) if index not in answers]
    return min(left, key=lambda index: (abs(index - middle), index), default=None)
