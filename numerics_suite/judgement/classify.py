"""What kind of change is a difference between two baselines?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numerics_suite.baselines.compare import Difference, difference
from numerics_suite.baselines.measurements import (
    contract_measurements,
    precision_measurements,
    semantic_measurements,
    training_measurements,
    worst_module,
)
from numerics_suite.core.errors import BadInputError, nearest
from numerics_suite.core.numbers import nan_last
from numerics_suite.core.records import Measurement
from numerics_suite.core.text import listed
from numerics_suite.judgement.diff_rows import Changed, changes
from numerics_suite.judgement.verdicts import Breach, judge

if TYPE_CHECKING:
    from numerics_suite.baselines.error_ratio import Errors
    from numerics_suite.baselines.records import CellBaseline
    from numerics_suite.baselines.store import Baselines
    from numerics_suite.core.records import Cell

KINDS = ("missing", "changed", "worse", "contract", "new", "better", "rounding", "identical")
"""Worst first: the kind of a cell is the first that applies."""

FAILING = frozenset({"missing", "changed", "worse", "contract"})
"""Kinds for which an upgrade is not to be made without a look."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A judged difference.

    Attributes:
        module: where it starts, by its new name; None where no module is at fault.
        error_ratio: error against true fp64, new over old; NaN where it was not measured.
        details: `why` (a line for each breach), numbers, and everything else that a person may ask.
        all_kinds: every kind that applies, worst first.
        changed: what is another value than it was, for a person to read.
    """

    kind: str
    module: str | None
    error_ratio: float
    details: Mapping[str, Any]
    all_kinds: tuple[str, ...]
    changed: tuple[Changed, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One entry of the answer of `compare`.

    Attributes:
        cell: by the new subject's name; by the old one's where the cell is missing.
        against: the old subject's name where it is another.
    """

    cell: Cell
    judged: Judged
    against: str | None = field(default=None)

    @property
    def kind(self) -> str:
        """Of :data:`KINDS`."""
        return self.judged.kind


def judge_difference(found: Difference) -> Judged:
    """The kind of a difference, and where it starts."""
    breaches = _breaches(found)
    kinds = _kinds(found, breaches)
    module = _module(found, kinds[0], breaches)
    return Judged(
        kind=kinds[0],
        module=module,
        error_ratio=found.errors.ratio if found.errors is not None else math.nan,
        details=_details(found, kinds, breaches),
        all_kinds=kinds,
        changed=changes(found, kinds, _moved(found)),
    )


def _moved(found: Difference) -> list[Errors]:
    """Modules whose error is larger or smaller than chance explains."""
    return [item for item in found.local if not item.excess <= 1 or item.relief > 1]


def _breaches(found: Difference) -> dict[str, list[Breach]]:
    """Breaches by kind."""
    training = list(training_measurements(found))
    asked: tuple[tuple[str, Iterable[Measurement]], ...] = (
        ("baseline.semantics", semantic_measurements(found)),
        ("baseline.precision", precision_measurements(found)),
        ("baseline.training", training),
        ("baseline.contract", contract_measurements(found)),
    )
    by_kind: dict[str, list[Breach]] = {}
    for check, measurements in asked:
        listed = list(measurements)
        for breach in judge(check, listed) if listed else []:
            by_kind.setdefault(_kind_of(breach), []).append(breach)
    return by_kind


def _kind_of(breach: Breach) -> str:
    if breach.measurement.name in {"vanished", "gone"}:
        return "missing"
    return {"semantic-change": "changed", "rounding-change": "worse", "contract-change": "contract"}[
        breach.budget.cause
    ]


def _kinds(found: Difference, breaches: Mapping[str, Sequence[Breach]]) -> tuple[str, ...]:
    kinds = [kind for kind in KINDS if breaches.get(kind)]
    # Where another function is computed, a part that it does not run is part of that change, and not a part unseen.
    if "changed" in kinds and not found.vanished:
        kinds.sort(key=lambda kind: (kind != "changed", KINDS.index(kind)))
    # Another function rounds otherwise: how its error compares with the old one's is no change of its own.
    if "changed" in kinds:
        kinds = [kind for kind in kinds if kind != "worse"]
    elif "worse" not in kinds and _relieved(found) is not None:
        kinds.append("better")
    if not found.same_bits:
        kinds.append("rounding")
    kinds = [kind for kind in kinds if kind != "rounding" or not {"changed", "worse", "better"} & set(kinds)]
    return tuple(kinds) or ("identical",)


def _relieved(found: Difference) -> str | None:
    """The module whose error fell by more than chance explains; empty for the whole model, None where none did."""
    modules = [item.name for item in found.local if item.relief > 1]
    if modules:
        return modules[0]
    return "" if found.errors is not None and found.errors.relief > 1 else None


def _module(found: Difference, kind: str, breaches: Mapping[str, Sequence[Breach]]) -> str | None:
    if kind == "better":
        return _relieved(found) or None
    if kind == "changed":
        return found.module
    if kind == "worse":
        place = worst_module(found.local)
        if place is not None and not place.excess <= 1:
            return place.name
        return found.gradient_errors.name or None if found.gradient_errors is not None else None
    if kind == "missing":
        lost = next((part for part in found.gone if part.startswith("module ")), "")
        return lost.removeprefix("module ") or None
    return next((breach.measurement.module for breach in breaches.get(kind, ())), None)


def _details(found: Difference, kinds: tuple[str, ...], breaches: Mapping[str, Sequence[Breach]]) -> dict[str, Any]:
    details: dict[str, Any] = {
        "all_kinds": list(kinds),
        "why": [_line(breach) for kind in KINDS for breach in breaches.get(kind, ()) if kind in kinds],
        "true_answers": max((item.value for item in found.answers), key=nan_last, default=0.0),
        "true_loss": found.loss,
        "true_gradient": max((item.value for item in found.gradients), key=nan_last, default=0.0),
        "bits_differ": list(found.bits),
        "headroom_change": found.headroom,
    }
    if found.errors is not None:
        details |= {"error_before": found.errors.old, "error_now": found.errors.new}
    optional: dict[str, Any] = {
        "local_errors": [
            {"module": item.name, "before": item.old, "now": item.new, "ratio": item.ratio} for item in _moved(found)
        ],
        "matched": found.modules.told(),
        "moved_modules": list(found.modules.moved),
        "new_modules": list(found.modules.appeared),
        "missing": [*found.vanished, *found.gone],
        "tensors": [
            {"name": item.name, "before": item.old, "now": item.new, "difference": item.value} for item in found.tensors
        ],
        "fused": [fusion.told() for fusion in found.fused],
        "inlined_modules": list(found.inlined),
        "not_compared": list(found.unrecorded),
        "contract": [change.told() for change in found.contract if change.how != "added"],
        "contract_added": [change.told() for change in found.contract if change.how == "added"],
        "subject": list(found.subject),
        "environment": list(found.environment),
    }
    return details | {name: value for name, value in optional.items() if value}


def _line(breach: Breach) -> str:
    """`true-answers 0.0012 in model.norm, 1e-10 allowed (answer: right.logits)`."""
    measured = breach.measurement
    place = f" in {measured.module}" if measured.module else ""
    told = ("answer", "roundoffs before", "roundoffs now", "error before", "error now")
    facts = [f"{name}: {_shown(measured.facts[name])}" for name in told if name in measured.facts]
    step = f" from step {measured.step} on" if measured.step is not None else ""
    parameters = f" of {measured.parameters[0]}" if measured.parameters else ""
    return (
        f"{measured.name} {_shown(measured.value)}{parameters}{place}{step}, {_shown(breach.budget.limit)} allowed"
        + (f" ({'; '.join(facts)})" if facts else "")
    )


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.3g}"


def compare_baselines(old: Baselines, new: Baselines, pairs: Sequence[tuple[str, str]] = ()) -> list[Comparison]:
    """Every cell of either folder, by the old folder's order and then what only the new one holds.

    Args:
        old: the reference.
        new: the other.
        pairs: names of subjects that are the same under another name, old and new.

    Raises:
        BadInputError: no cell is in both, a pair names no subject, or a cell was measured on other batches.
    """
    named = _names(old, new, pairs)
    taken = set()
    found = []
    for cell, before in old.items():
        wanted = _renamed(cell, named.get(cell.subject, cell.subject))
        if wanted in new:
            taken.add(wanted)
            against = cell.subject if wanted.subject != cell.subject else None
            found.append(Comparison(cell=wanted, judged=_judged(before, new[wanted]), against=against))
        else:
            found.append(Comparison(cell=cell, judged=only_in("missing", f"{new.folder} has no such cell")))
    if not taken:
        message = (
            f"{old.folder} and {new.folder} have no cell in common ({_told(old)} and {_told(new)}); "
            "--as OLD=NEW pairs subjects of different names"
        )
        raise BadInputError(message)
    found += [
        Comparison(cell=cell, judged=only_in("new", f"{old.folder} has no such cell"))
        for cell in new
        if cell not in taken
    ]
    return found


def _judged(old: CellBaseline, new: CellBaseline) -> Judged:
    return judge_difference(difference(old, new))


def only_in(kind: str, why: str) -> Judged:
    """The judgement of a cell that only one side has."""
    return Judged(
        kind=kind, module=None, error_ratio=math.nan, details={"all_kinds": [kind], "why": [why]}, all_kinds=(kind,)
    )


def _names(old: Baselines, new: Baselines, pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    for side, folder, index in (("OLD", old, 0), ("NEW", new, 1)):
        subjects = {cell.subject for cell in folder}
        for pair in pairs:
            if pair[index] not in subjects:
                hint = nearest(pair[index], subjects) or f" (it has {', '.join(sorted(subjects))})"
                message = f"--as {pair[0]}={pair[1]}: {side} ({folder.folder}) has no subject '{pair[index]}'{hint}"
                raise BadInputError(message)
        repeated = [pair[index] for pair in pairs if sum(other[index] == pair[index] for other in pairs) > 1]
        if repeated:
            message = f"--as: '{repeated[0]}' is paired twice"
            raise BadInputError(message)
    return dict(pairs)


def _renamed(cell: Cell, subject: str) -> Cell:
    from dataclasses import replace

    return replace(cell, subject=subject)


def _told(baselines: Baselines) -> str:
    return listed([f"{cell.id} ({cell.task})" for cell in baselines], 2)
