"""How near its budget a result is: the one number of many that tells most."""

from __future__ import annotations

import ast
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numerics_suite
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.numbers import nan_last
from numerics_suite.judgement.budgets import budgets_of
from numerics_suite.reports.view.finding_text import value_text
from numerics_suite.reports.view.formats import number, worst_status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numerics_suite.core.records import CheckResult
    from numerics_suite.reports.view.places import CheckCell

INFORMS = {"forward.headroom": "bits"}
"""Checks whose telling number has no budget, by its name; the least is worst."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """The measurement of a result that is nearest its budget, or furthest beyond it.

    Attributes:
        limit: of its budget, None where it only informs.
        fall: of the loss in nats, where the value is its rise.
    """

    name: str
    value: float
    limit: float | None
    fall: float | None = None

    @property
    def share(self) -> float:
        """The value in units of the limit; what is beyond a limit of 0 is infinitely so, and NaN as well."""
        if self.limit is None:
            return 0.0
        return share_of(self.value, self.limit)

    @property
    def order(self) -> tuple[float, float]:
        """Nearest its budget is largest, of equals the larger value; of numbers that only inform (bits of headroom), the least."""
        if self.limit is None:
            return nan_last(-self.value), 0.0
        return self.share, nan_last(self.value)

    @property
    def text(self) -> str:
        """`norm 0.6054, at most 0.75`; a limit of 0 is left out, but for a rise."""
        if self.name == "rise" and self.fall is not None:
            return value_text(self.name, self.value, 0, "", self.fall)
        allowed = f", at most {number(self.limit)}" if self.limit else ""
        return f"{self.name} {number(self.value)}{allowed}"


def share_of(value: float, limit: float) -> float:
    """A value in units of its limit; what is beyond a limit of 0 is infinitely so, and NaN as well."""
    if math.isnan(value):
        return math.inf
    if limit == 0:
        return math.inf if value > 0 else 0.0
    return value / limit


def nearest(result: CheckResult) -> Nearest | None:
    """The measurement that is nearest its budget; None where no budget judges any and none informs."""
    informs = INFORMS.get(result.check)
    if informs is not None and informs in result.measurements and result.status == "passed":
        return Nearest(name=informs, value=result.measurements[informs], limit=None)
    limits = _limits(result.check)
    worst, share = None, -math.inf
    for name, value in result.measurements.items():
        limit = limits.get(name)
        if limit is not None and (found := share_of(value, limit)) > share:
            worst, share = name, found
    if worst is None:
        return None
    fall = result.measurements.get("fall")
    return Nearest(name=worst, value=result.measurements[worst], limit=limits[worst], fall=fall)


def worst_of(
    members: Sequence[CheckCell], nearest_of: Callable[[CheckResult], Nearest | None] = nearest
) -> tuple[Nearest | None, CheckCell | None]:
    """The value that tells most of one check over many cells, and where that is; no place where all are alike.

    Args:
        members: the results of one check, at least one.
        nearest_of: what :func:`nearest` says of each.
    """
    status = worst_status(place.result.status for place in members)
    alike = [place for place in members if place.result.status == status]
    if status in {"skipped", "error"}:
        return None, alike[0] if status == "error" else None
    rated = [(value, place) for place in alike if (value := nearest_of(place.result)) is not None]
    worst, where = max(rated, key=lambda pair: pair[0].order, default=(None, alike[0]))
    if worst is None:
        return None, where if status != "passed" else None
    same = status == "passed" and all(value.order == worst.order for value, _ in rated)
    return worst, None if same else where


@cache
def _limits(check: str) -> Mapping[str, float]:
    try:
        return {name: budget.limit for name, budget in budgets_of(check).items()}
    except BadInputError:
        # Another package's check, which cannot be loaded here: its results can be shown all the same.
        return {}


@cache
def question(check: str) -> str:
    """The question that a check asks: the first line of its docstring, read without importing it; empty for others' checks."""
    group, _, name = check.partition(".")
    if not (group + name).replace("-", "").isalpha():
        return ""
    path = Path(numerics_suite.__file__).parent / "checks" / group / f"{name.replace('-', '_')}.py"
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError):
        return ""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""
