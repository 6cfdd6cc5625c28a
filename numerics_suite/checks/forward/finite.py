"""forward.finite."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.core.records import Batch, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.observations.finiteness import nonfinite_count


@check(batches=True, runs_on_nonfinite=True)
def finite(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Is every output finite, at real tokens and at padding alike?

    Raw logits are read: some remote code replaces NaN scores before sampling. The logits of padding count too, since
    a NaN there reaches the parameters through the loss, where 0 times NaN is NaN.
    """
    bad = {name: count for name, value in context.forward(batch).items() if (count := nonfinite_count(value))}
    yield Measurement(
        name="non-finite", value=sum(bad.values()), unit="elements", facts={f"in {name}": n for name, n in bad.items()}
    )
