"""The `reference.*` checks of every cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numerics_suite.suite.items import Asked


def test_reference(numerics_question: Asked) -> None:
    """Ask the check; the plugin turns the answer into the item's outcome."""
    numerics_question.ask()
