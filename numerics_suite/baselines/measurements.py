"""A difference as the measurements of the four `baseline.*` checks; `compare` and `check --baseline` judge the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from numerics_suite.baselines.compare import Deviation, Difference
from numerics_suite.baselines.error_ratio import Errors
from numerics_suite.core.numbers import nan_last
from numerics_suite.core.records import Fact, Measurement
from numerics_suite.core.text import listed

if TYPE_CHECKING:
    from collections.abc import Sequence

NAMED = 6
"""Entries that a fact names before it says how many more there are."""


def semantic_measurements(found: Difference) -> Iterator[Measurement]:
    """True fp64: answers, loss, gradients."""
    facts = _place_facts(found)
    answer = _worst(found.answers)
    yield Measurement(
        name="true-answers",
        value=answer.value,
        unit="ratio",
        module=found.module,
        facts={**({"answer": answer.name} if answer.name else {}), **facts},
    )
    yield Measurement(name="true-loss", value=found.loss, unit="ratio", module=found.module, facts=facts)
    gradient = _worst(found.gradients)
    yield Measurement(
        name="true-gradient",
        value=gradient.value,
        unit="ratio",
        module=found.module,
        parameters=(gradient.name,) if gradient.value else (),
        facts=facts,
    )


def precision_measurements(found: Difference) -> Iterator[Measurement]:
    """The error against true fp64 in the cell's precision, of the whole and of each module."""
    facts = _place_facts(found)
    whole = found.errors
    if whole is not None:
        told: dict[str, Fact] = {"error before": whole.old, "error now": whole.new, "ratio": whole.ratio}
        place = worst_module(found.local)
        module = place.name if place is not None and place.excess > 1 else None
        yield Measurement(name="excess", value=whole.excess, unit="ratio", module=module, facts={**told, **facts})
        yield Measurement(name="error-ratio", value=whole.ratio, unit="ratio")
    else:
        yield Measurement(name="excess", value=0.0, unit="ratio", facts={"error": "measured in neither version"})
    gradients = found.gradient_errors
    if gradients is not None:
        yield Measurement(
            name="gradient-excess",
            value=gradients.excess,
            unit="ratio",
            module=gradients.name or None,
            facts={"median error before": gradients.old, "median error now": gradients.new} | facts,
        )
    place = worst_module(found.local)
    yield Measurement(
        name="local-excess",
        value=place.excess if place is not None else 0.0,
        unit="ratio",
        module=place.name if place is not None else None,
        facts=_local_facts(place) | facts if place is not None else facts,
    )
    yield Measurement(name="headroom-change", value=found.headroom, unit="bits")


def training_measurements(found: Difference) -> Iterator[Measurement]:
    """The training curve; nothing where neither version has one."""
    curve = found.curve
    if curve is None:
        return
    step = curve.became_nonfinite
    yield Measurement(
        name="became-non-finite", value=float(step is not None), unit="runs", step=step, module=found.module
    )
    yield Measurement(name="true-curve", value=curve.true, unit="ratio", module=found.module)
    yield Measurement(name="curve-growth", value=curve.growth, unit="ratio", module=found.module)


def contract_measurements(found: Difference) -> Iterator[Measurement]:
    """What callers rely on, and what the old baseline watched."""
    broken = [change.told() for change in found.contract if change.how != "added"]
    added = [change.told() for change in found.contract if change.how == "added"]
    facts: dict[str, Fact] = {"entries": listed(broken, NAMED)} if broken else {}
    facts |= {"added": listed(added, NAMED)} if added else {}
    yield Measurement(name="changed-entries", value=len(broken), unit="entries", facts=facts)
    lost: dict[str, Fact] = {"missing": listed(found.vanished, NAMED)} if found.vanished else {}
    yield Measurement(name="vanished", value=len(found.vanished), unit="parts", facts=lost)
    gone: dict[str, Fact] = {"gone": listed(found.gone, NAMED)} if found.gone else {}
    yield Measurement(name="gone", value=len(found.gone), unit="parts", facts=gone)


def worst_module(local: Sequence[Errors]) -> Errors | None:
    """The first module to return whose error grew beyond chance, so the innermost; else the one that is nearest to it."""
    over = [item for item in local if not item.excess <= 1]
    if over:
        return over[0]
    return max(local, key=lambda item: item.excess, default=None)


def _local_facts(place: Errors) -> dict[str, Fact]:
    return {"roundoffs before": place.old, "roundoffs now": place.new, "ratio": place.ratio}


def _place_facts(found: Difference) -> dict[str, Fact]:
    facts: dict[str, Fact] = {}
    if told := found.modules.told():
        facts["modules"] = told
    if found.subject:
        facts["subject"] = ", ".join(found.subject)
    if found.environment:
        facts["versions"] = listed(found.environment, NAMED)
    return facts


def _worst(values: Sequence[Deviation]) -> Deviation:
    """NaN is the worst there is."""
    return max(
        values,
        key=lambda item: nan_last(item.value),
        default=Deviation(name="", value=0.0),
    )
