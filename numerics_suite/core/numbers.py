"""Numbers that are not finite: in JSON, as CONTRACT.md writes them ("NaN", "Infinity", "-Infinity"), and in an order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

NAMES = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def nan_last(value: float) -> float:
    """Key under which `max` gives the worst value: NaN counts as infinite, and is not passed over."""
    return math.inf if math.isnan(value) else value


def name_of(value: float) -> str:
    """`NaN`, `Infinity` or `-Infinity`."""
    return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")


def jsonable(value: Any) -> Any:
    """The value in JSON's own types, with the names of numbers that are not finite; what has no type is its text."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else name_of(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return str(value)


def revived(value: Any) -> Any:
    """The inverse of :func:`jsonable` where numbers are expected: names become numbers again."""
    if isinstance(value, str):
        return NAMES.get(value, value)
    if isinstance(value, Mapping):
        return {key: revived(item) for key, item in value.items()}
    if isinstance(value, list):
        return [revived(item) for item in value]
    return value
