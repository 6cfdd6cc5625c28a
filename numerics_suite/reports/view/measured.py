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
from numerics_suite.judgement.budgets import budgets_of
from numerics_suite.reports.summary import INFORMS
from numerics_suite.reports.view.formats import number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numerics_suite.core.records import CheckResult


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """The measurement of a result that is nearest its budget, or furthest beyond it.

    Attributes:
        name: of the measurement.
        value: the number.
        limit: of its budget, None where it only informs.
    """

    name: str
    value: float
    limit: float | None

    @property
    def share(self) -> float:
        """The value in units of the limit; what is beyond a limit of 0 is infinitely so, and NaN as well."""
        if self.limit is None:
            return 0.0
        return share_of(self.value, self.limit)

    @property
    def text(self) -> str:
        """`norm 0.6054 of 0.75`."""
        allowed = "" if self.limit is None else f" of {number(self.limit)}"
        return f"{self.name} {number(self.value)}{allowed}"


def share_of(value: float, limit: float) -> float:
    """A value in units of its limit; what is beyond a limit of 0 is infinitely so, and NaN as well.

    Args:
        value: measured.
        limit: the most that it may be.
    """
    if math.isnan(value):
        return math.inf
    if limit == 0:
        return math.inf if value > 0 else 0.0
    return value / limit


def nearest(result: CheckResult) -> Nearest | None:
    """The measurement that is nearest its budget; None where no budget judges any and none informs.

    Args:
        result: what a check said of a cell.
    """
    informs = INFORMS.get(result.check)
    if informs is not None and informs[0] in result.measurements and result.status == "passed":
        return Nearest(name=informs[0], value=result.measurements[informs[0]], limit=None)
    limits = _limits(result.check)
    worst, share = None, -math.inf
    for name, value in result.measurements.items():
        limit = limits.get(name)
        if limit is not None and (found := share_of(value, limit)) > share:
            worst, share = name, found
    return None if worst is None else Nearest(name=worst, value=result.measurements[worst], limit=limits[worst])


@cache
def _limits(check: str) -> Mapping[str, float]:
    try:
        return {name: budget.limit for name, budget in budgets_of(check).items()}
    except BadInputError:
        # Another package's check, which cannot be loaded here: its results can be shown all the same.
        return {}


@cache
def question(check: str) -> str:
    """The question that a check asks: the first line of its docstring, read without importing it; empty for others' checks.

    Args:
        check: its id.
    """
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
