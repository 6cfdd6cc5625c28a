"""forward.batch."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from numerics_suite.checks._laws import law_measurements, skipped_law
from numerics_suite.core.records import Batch, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.references import (
    caller,
    compare_law,
    plain_answer,
    rounded_answer,
    true_answer,
    without_labels,
)
from numerics_suite.observations.divergence import Side, first_parting


@check(batches=True, share=0.5, needs=("token-ids",))
def batch(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Is a row's answer the same alone as among its neighbours?

    The first and the last row are run alone, at their width in the batch.
    """
    rows = int(batch.tensors["input_ids"].shape[0])
    if rows < 2 or not batch.laws_apply:
        yield from skipped_law()
        return
    mask = batch.tensors["attention_mask"].bool()
    for row in (0, rows - 1):
        alone = {name: value[row : row + 1] for name, value in batch.tensors.items()}
        real = mask[row]

        def of_row(answer: Tensor, index: int, real: Tensor = real) -> Tensor:
            return answer[index][real]

        found = compare_law(
            context,
            true=of_row(true_answer(context, batch.tensors), row),
            true_other=of_row(true_answer(context, alone), 0),
            other=of_row(plain_answer(context, alone), 0),
            base=lambda row=row: of_row(rounded_answer(context, batch.tensors), row),  # type: ignore[misc]
        )
        together, apart = (
            Side(
                model=context.model,
                tensors=without_labels(tensors),
                call=caller(context, by_token=True),
                pick=lambda state, index=index, of_row=of_row: of_row(state, index),  # type: ignore[misc]
            )
            for tensors, index in ((batch.tensors, row), (alone, 0))
        )
        yield from law_measurements(*found, place=lambda one=together, other=apart: first_parting(one, other))  # type: ignore[misc]
