"""What the metamorphic laws share: the two measurements that each of them gives."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.core.records import Measurement


def law_measurements(exact: float, rounded: float, *, module: str | None = None) -> Iterable[Measurement]:
    """`true` (`max|a-b|/rms` in true fp64) and `rounded` (error in p in units of the inherent error)."""
    yield Measurement(name="true", value=exact, unit="ratio", module=module)
    yield Measurement(name="rounded", value=rounded, unit="ratio", module=module)


def skipped_law() -> Iterable[Measurement]:
    """A batch that the law is not asked of, by definition (a pad id among its real tokens)."""
    return law_measurements(0.0, 0.0)
