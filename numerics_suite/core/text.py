"""Names in a sentence."""

from __future__ import annotations

from collections.abc import Sequence


def listed(items: Sequence[str], limit: int) -> str:
    """The first items with commas between, and how many more there are.

    Args:
        items: any number.
        limit: how many are named.
    """
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more
