"""forward.causal."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from numerics_suite.checks._laws import law_measurements, skipped_law
from numerics_suite.core.errors import NotApplicableError
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
def causal(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Does a later token leave the answers at earlier positions alone?

    Every token from the middle of the batch's width on is changed to another id; what comes before must not move.
    """
    if not context.family.causal:
        reason = "an encoder: its tokens see both sides"
        raise NotApplicableError(reason)
    width = int(batch.tensors["input_ids"].shape[1])
    if width < 2 or not batch.laws_apply:
        yield from skipped_law()
        return
    cut = width // 2
    changed = _with_other_future(batch, cut, context)
    real = batch.tensors["attention_mask"].bool()[:, :cut]
    if not bool(real.any()):
        yield from skipped_law()
        return

    def past(answer: Tensor) -> Tensor:
        return answer[:, :cut][real]

    found = compare_law(
        context,
        true=past(true_answer(context, batch.tensors)),
        true_other=past(true_answer(context, changed)),
        other=past(plain_answer(context, changed)),
        base=lambda: past(rounded_answer(context, batch.tensors)),
    )

    def place() -> str | None:
        call = caller(context, by_token=True)
        plain, other = (
            Side(model=context.model, tensors=tensors, call=call, pick=past)
            for tensors in (without_labels(batch.tensors), changed)
        )
        return first_parting(plain, other)

    yield from law_measurements(*found, place=place)


def _with_other_future(batch: Batch, cut: int, context: CellContext) -> dict[str, Tensor]:
    """Real tokens from `cut` on replaced by another id that is not the pad id."""
    ids, mask = batch.tensors["input_ids"].clone(), batch.tensors["attention_mask"]
    other = (ids + 1) % context.vocab_size
    pad = context.space.pad_id
    other[other == pad] = (pad + 1) % context.vocab_size
    later = mask.bool().clone()
    later[:, :cut] = False
    ids[later] = other[later]
    return {"input_ids": ids, "attention_mask": mask}
