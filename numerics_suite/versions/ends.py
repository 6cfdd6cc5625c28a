"""The two ends of a search, and what is said where they are none."""

from __future__ import annotations

from typing import NoReturn

from numerics_suite.core.errors import BadInputError


def refuse_equal(good: str, bad: str) -> None:
    """Two ends that are one have nothing between them.

    Raises:
        BadInputError: they are equal.
    """
    if good == bad:
        message = f"--good and --bad are both {good}: give two different ends"
        raise BadInputError(message)


def refuse_swapped(good: str, bad: str) -> NoReturn:
    """Say that the ends stand the wrong way round.

    Args:
        good: as typed; the newer one.
        bad: as typed.

    Raises:
        BadInputError: always.
    """
    message = f"--good {good} is newer than --bad {bad}: swap them (--good {bad} --bad {good})"
    raise BadInputError(message)
