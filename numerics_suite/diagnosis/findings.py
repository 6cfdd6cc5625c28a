"""Writing a breach down as a finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from numerics_suite.core.records import Batch, Fact, Finding
from numerics_suite.core.text import listed
from numerics_suite.diagnosis.remedy_register import remedies_of, untried
from numerics_suite.diagnosis.root_causes import with_cause
from numerics_suite.judgement.verdicts import Breach

if TYPE_CHECKING:
    from numerics_suite.engine.cell_context import CellContext

NAMED = 4
"""Parameters that a title names before it says how many more there are."""

WRITTEN_ELEMENTS = 4096
"""A batch of more elements is written as its shapes only."""


def finding(breaches: Sequence[Breach], context: CellContext, batch: Batch | None, *, diagnose: bool = True) -> Finding:
    """The finding of the worst breach, with the others in its evidence.

    Args:
        breaches: worst first, at least one.
        context: the cell.
        batch: the smallest failing batch, None where the check took none.
        diagnose: replay to find cause and place.
    """
    worst = with_cause(breaches[0], context, batch) if diagnose else breaches[0]
    measured, budget = worst.measurement, worst.budget
    cause = measured.cause or budget.cause
    facts: dict[str, Fact] = {
        "measurement": measured.name,
        "measured": measured.value,
        "allowed": budget.limit,
        "unit": measured.unit,
        **measured.facts,
    }
    for other in breaches[1:]:
        facts[f"also {other.measurement.name}"] = other.measurement.value
        facts[f"also {other.measurement.name} allowed"] = other.budget.limit
    return Finding(
        cause=cause,
        title=title(worst),
        explanation=budget.reason,
        module=measured.module,
        op=measured.op,
        source=measured.source,
        step=measured.step,
        parameters=measured.parameters,
        evidence=facts,
        batch=batch_as_json(batch) if batch is not None else None,
        remedies=untried(tuple(dict.fromkeys((*_remedies(worst, breaches[1:], cause), *remedies_of(cause)))), cause),
    )


OF_NO_HELP = {"dead-gradient": frozenset({"tune-loss-scale"})}
"""By cause, remedies of its budget that are for another one: a gradient that only float16 loses is `underflow`."""


def _remedies(worst: Breach, others: Sequence[Breach], cause: str) -> tuple[str, ...]:
    """The worst breach's, and those of other breaches at its module: what is wrong there may be seen best in another number."""
    module = worst.measurement.module
    alike = [other for other in others if module is not None and other.measurement.module == module]
    named = dict.fromkeys(name for breach in (worst, *alike) for name in breach.budget.remedies)
    return tuple(name for name in named if name not in OF_NO_HELP.get(cause, ()))


def title(breach: Breach) -> str:
    """The budget's title with the measurement's values in it."""
    value = breach.measurement.value
    return breach.budget.title.format(
        value=int(value) if value == value and abs(value) < 2**53 and value == int(value) else value,
        limit=breach.budget.limit,
        module=breach.measurement.module or "the model",
        parameters=listed(breach.measurement.parameters, NAMED),
        step=breach.measurement.step,
        facts=breach.measurement.facts,
    )


def batch_as_json(batch: Batch) -> Mapping[str, Any]:
    """The batch as it is written into a result: how it was drawn, dtypes, shapes, and the values of a small one."""
    written: dict[str, Any] = {"drawn": batch.drawn}
    for name, value in batch.tensors.items():
        if isinstance(value, Tensor):
            entry: dict[str, Any] = {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            if value.numel() <= WRITTEN_ELEMENTS:
                entry["values"] = value.detach().cpu().tolist()
            written[name] = entry
        else:
            written[name] = repr(value)
    return written
