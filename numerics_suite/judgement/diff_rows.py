"""What is another value in the new baseline than in the old one, in the order in which a person asks."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from numerics_suite.core.exact import AGREED
from numerics_suite.core.numbers import nan_last

if TYPE_CHECKING:
    from numerics_suite.baselines.compare import Difference
    from numerics_suite.baselines.error_ratio import Errors

Value: TypeAlias = "float | str | tuple[float, ...] | None"
"""A number, a text, a curve, or None on the side that lacks it; an empty text is there and says no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """One thing that changed.

    Attributes:
        what: `outputs.logits`, `error of model.norm`, `true loss`, `transformers`, …
        old: None for what is new.
        new: None for what is gone.
        group: what else is of its kind: `contract`, `missing`, `tensors`, `errors`, `loss`, `subject`, `versions`, and modules.
    """

    what: str
    group: str
    old: Value = None
    new: Value = None
    unit: str = ""


def changes(found: Difference, kinds: Collection[str], moved: Sequence[Errors]) -> tuple[Changed, ...]:
    """Everything of a difference that has an old and a new value.

    Args:
        found: of one cell.
        kinds: that apply to it: where the function is the same and rounds as well, its curve is the same to the eye.
        moved: modules whose error is larger or smaller than chance explains.
    """
    values = (*_contract(found), *_lost(found), *_tensors(found), *_errors(found, moved), *_training(found, kinds))
    return (*values, *_facts(found), *_modules(found))


def _contract(found: Difference) -> Iterator[Changed]:
    for change in found.contract:
        yield Changed(
            what=change.entry,
            group="contract",
            old=None if change.how == "added" else change.old,
            new=None if change.how == "removed" else change.new,
        )


def _lost(found: Difference) -> Iterator[Changed]:
    for part in (*found.vanished, *found.gone):
        yield Changed(what=part, group="missing", old="")


def _tensors(found: Difference) -> Iterator[Changed]:
    for item in sorted(found.tensors, key=lambda item: -nan_last(item.value)):
        moved = f", other values (by {item.value:.2g} of its root mean square)" if 0 < item.value < math.inf else ""
        yield Changed(what=f"tensor {item.name}", group="tensors", old=item.old, new=f"{item.new}{moved}")


def _errors(found: Difference, moved: Sequence[Errors]) -> Iterator[Changed]:
    for item in sorted(moved, key=lambda item: -max(item.excess, item.relief)):
        yield Changed(what=f"error of {item.name}", group="errors", old=item.old, new=item.new, unit="roundoffs")
    whole = found.errors
    if whole is not None and not found.same_bits and whole.old != whole.new:
        yield Changed(what="error against float64", group="errors", old=whole.old, new=whole.new)


def _training(found: Difference, kinds: Collection[str]) -> Iterator[Changed]:
    old, new = found.losses
    if not found.loss <= AGREED and not (math.isnan(old) and math.isnan(new)):
        yield Changed(what="true loss", group="loss", old=old, new=new, unit="nats")
    curve = found.curve
    if curve is not None and curve.old != curve.new and {"changed", "worse"} & set(kinds):
        yield Changed(what="training loss", group="loss", old=curve.old, new=curve.new)


def _facts(found: Difference) -> Iterator[Changed]:
    for group, lines in (("subject", found.subject), ("versions", found.environment)):
        for line in lines:
            what, _, values = line.partition(" ")
            old, _, new = values.partition(" → ")
            yield Changed(what=what, group=group, old=old, new=new)


def _modules(found: Difference) -> Iterator[Changed]:
    for name in found.modules.appeared:
        yield Changed(what=f"module {name}", group="new modules", new="")
    for old, new in found.modules.renamed:
        yield Changed(what="module", group="renamed modules, matched by order and shape", old=old, new=new)
