"""Names in a sentence."""

from __future__ import annotations

from collections.abc import Sequence


def listed(items: Sequence[str], limit: int) -> str:
    """The first items with commas between, and how many more there are."""
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + more


def percent(share: float) -> str:
    """A share in percent, two digits: `0.021 %`, `99 %`; `100 %` of the whole alone."""
    return f"{share * 100:.2g} %" if share < 0.995 else f"{share * 100:.4g} %"


def harmless(text: str) -> str:
    """A line that a terminal or a CI system shows and does not obey.

    GitHub's runner takes a printed line as a command where it begins with `::`, in its older form with `##[` anywhere.
    """
    shown = "".join(letter if letter.isprintable() else "?" for letter in text).replace("##[", "## [")
    begin = len(shown) - len(shown.lstrip())
    return f"{shown[:begin]}: {shown[begin + 1 :]}" if shown.startswith("::", begin) else shown
