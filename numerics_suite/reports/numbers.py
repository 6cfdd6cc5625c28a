"""Numbers as a person reads them."""

from __future__ import annotations

import math
from typing import Any

from numerics_suite.core.numbers import name_of


def shown(value: Any) -> str:
    """A number as a person reads it, in four digits; a text as it is."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return name_of(value)
    if value == int(value) and abs(value) < 10**9:
        return f"{int(value):,}"
    return f"{value:.4g}"
