"""forward.padding."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from numerics_suite.checks._laws import is_rotary, law_measurements, skipped_law
from numerics_suite.core.numbers import nan_last
from numerics_suite.core.records import Batch, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.evidence import Evidence
from numerics_suite.engine.references import (
    caller,
    compare_law,
    plain_answer,
    rounded_answer,
    true_answer,
    without_labels,
)
from numerics_suite.observing.parting import Side, first_parting
from numerics_suite.observing.roundoff import relative_error

EXTRA = 3
"""Columns of padding that are added; one would do for most mistakes, three also move a wrong position by more."""


@check(batches=True, share=0.5, needs=("token-ids",))
def padding(evidence: Evidence, batch: Batch) -> Iterable[Measurement]:
    """Does more padding, on each side that the family declares, leave the real tokens' answers alone?

    No `position_ids` are given: with them an ignored mask would go unseen under left padding.
    """
    if not batch.law_abiding:
        yield from skipped_law()
        return
    real = batch.tensors["attention_mask"].bool()
    worst, worst_side = (0.0, 0.0, ""), ""
    for side in _sides(evidence, batch):
        more = padded(batch, side, evidence.space.pad_id)
        where = more["attention_mask"].bool()
        found = compare_law(
            evidence,
            true=_tokens(true_answer(evidence, batch.tensors), real),
            true_other=_tokens(true_answer(evidence, more), where),
            other=_tokens(plain_answer(evidence, more), where),
            base=lambda: _tokens(rounded_answer(evidence, batch.tensors), real),
        )
        if worst_side == "" or nan_last(found[0]) > nan_last(worst[0]):
            worst, worst_side = found, side
    yield from law_measurements(*worst, place=lambda: _place(evidence, batch, worst_side))
    if evidence.subject.task == "sequence-classification":
        yield from _pooled(evidence, batch)


def _place(evidence: Evidence, batch: Batch, side: str) -> str | None:
    """The module in which the padded run parts from the plain one."""

    def run(tensors: dict[str, Tensor]) -> Side:
        real = tensors["attention_mask"].bool()
        call = caller(evidence, by_token=True)
        return Side(model=evidence.model, tensors=tensors, call=call, pick=lambda state: state[real])

    plain, more = without_labels(batch.tensors), padded(batch, side, evidence.space.pad_id)
    return first_parting(run(plain), run(more), passed_over=is_rotary(evidence))


def _sides(evidence: Evidence, batch: Batch) -> list[str]:
    """The declared sides on which the batch may be padded further: a row is padded on one side only."""
    mask = batch.tensors["attention_mask"]
    taken = {"left": not bool(mask[:, 0].all()), "right": not bool(mask[:, -1].all())}
    opposite = {"left": "right", "right": "left"}
    return [side for side in evidence.family.padding_sides if not taken[opposite[side]]]


def padded(batch: Batch, side: str, pad: int) -> dict[str, Tensor]:
    """The batch with :data:`EXTRA` more columns of padding on a side."""
    ids, mask = batch.tensors["input_ids"], batch.tensors["attention_mask"]
    filler = torch.full((ids.shape[0], EXTRA), pad, dtype=ids.dtype)
    nothing = torch.zeros((ids.shape[0], EXTRA), dtype=mask.dtype)
    pairs = (ids, filler), (mask, nothing)
    columns = [torch.cat(pair if side == "right" else pair[::-1], dim=1) for pair in pairs]
    return {"input_ids": columns[0], "attention_mask": columns[1]}


def _tokens(answer: Tensor, real: Tensor) -> Tensor:
    return answer[real]


def _pooled(evidence: Evidence, batch: Batch) -> Iterable[Measurement]:
    """The pooled logits under more padding, in true fp64."""
    base = true_answer(evidence, batch.tensors, by_token=False)
    errors = [
        relative_error(true_answer(evidence, padded(batch, side, evidence.space.pad_id), by_token=False), base)
        for side in _sides(evidence, batch)
    ]
    worst = next((error for error in errors if error != error), max(errors, default=0.0))
    yield Measurement(name="true-pooled", value=worst, unit="ratio")
