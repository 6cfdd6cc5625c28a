"""inputs.mask-dtype."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.core.records import Batch, Measurement
from numerics_suite.core.registry import check
from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.outputs import floating_outputs, main_output
from numerics_suite.engine.reference_ops import preserved
from numerics_suite.inputs.batch_rows import edge_of_padding, telling_rows
from numerics_suite.inputs.strategies import MASK_DTYPES
from numerics_suite.observations.comparison import differing_elements

COLUMNS = 8
"""Tokens of a row that are run."""


@check(batches=True, share=0.4, needs=("token-ids",))
def mask_dtype(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Does a mask of ones and zeros give the same output in every dtype that a loader may produce?

    The bits are compared where tokens are real; a dtype that the model refuses is no disagreement. Two rows around the edge of the
    padding are enough: a mask is read in the same way everywhere.
    """
    part = context.inputs_of(batch)
    if batch.laws_apply:
        rows, columns = telling_rows(batch), edge_of_padding(batch, COLUMNS)
        part = {name: value[rows][:, columns] for name, value in part.items()}
    mask = part["attention_mask"]
    wanted = main_output(floating_outputs(context.run(part)))[1]
    disagreeing: dict[str, int] = {}
    for dtype in MASK_DTYPES[1:]:
        try:
            with preserved(context.model):  # a call that is refused halfway may leave the model changed
                got = main_output(floating_outputs(context.run({**part, "attention_mask": mask.to(dtype)})))[1]
        except (RuntimeError, TypeError, ValueError) as error:
            reraise_if_fatal(error)
            continue
        real = mask.bool() if wanted.dim() == 3 else None
        count = differing_elements(got[real], wanted[real]) if real is not None else differing_elements(got, wanted)
        if count:
            disagreeing[str(dtype).removeprefix("torch.")] = count
    yield Measurement(
        name="disagreement",
        value=sum(disagreeing.values()),
        unit="elements",
        facts={f"differing in {name}": count for name, count in disagreeing.items()},
    )
