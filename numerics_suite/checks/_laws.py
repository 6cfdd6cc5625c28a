"""The two measurements that all metamorphic laws yield."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import nn

from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Fact, Measurement
from numerics_suite.engine.cell_context import CellContext

TRUE_ONLY = "judged in true fp64 only"
"""Fact: why a law was not judged in the cell's own precision."""

NO_GRADIENTS = "gradients not compared"
"""Fact: why a check compared only outputs."""

UNSUPPORTED = "not supported"
"""Fact: the part of a law that the installed release or the model does not support. A check that does not fail is then
skipped with this reason."""


def law_measurements(  # noqa: PLR0913 - the words of one measurement
    exact: float,
    rounded: float,
    unrounded: str = "",
    *,
    place: Callable[[], str | None] | None = None,
    cause: str | None = None,
    facts: Mapping[str, Fact] | None = None,
) -> Iterable[Measurement]:
    """`true` (`max|a-b|/rms` in true fp64) and `rounded` (error in p in units of the inherent error).

    Args:
        exact: the first.
        rounded: the second.
        unrounded: why the second only detects lost values: an op has no float64 form, so there is no rounded run.
        place: finds the module in which the two true fp64 runs diverge; called only if they do.
        cause: of the first, if it is not the law's usual one.
        facts: of both.
    """
    told = dict(facts or {})
    module = place() if place is not None and not exact <= AGREED else None
    yield Measurement(name="true", value=exact, unit="ratio", module=module, cause=cause, facts=told)
    told = told | ({TRUE_ONLY: unrounded} if unrounded else {})
    yield Measurement(name="rounded", value=rounded, unit="ratio", module=module, facts=told)


def is_rotary(context: CellContext) -> Callable[[nn.Module], bool]:
    """Whether a module is the rotary embedding, whose output shifts with the positions."""
    return lambda module: context.family.kind_of(type(module).__name__) == "rotary"


def skipped_law() -> Iterable[Measurement]:
    """Skip a batch that the law does not cover (a pad id among its real tokens)."""
    return law_measurements(0.0, 0.0)
