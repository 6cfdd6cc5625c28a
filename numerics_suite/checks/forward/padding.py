"""forward.padding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from numerics_suite.checks._laws import is_rotary, law_measurements, skipped_law
from numerics_suite.core.exact import AGREED
from numerics_suite.core.numbers import nan_last
from numerics_suite.core.records import Batch, Fact, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.decoding import counted_positions, takes_positions
from numerics_suite.engine.position_table import absolute_positions
from numerics_suite.engine.references import (
    agreeing,
    caller,
    compare_law,
    plain_answer,
    true_answer,
    without_labels,
)
from numerics_suite.inputs.batch_rows import telling_rows
from numerics_suite.observations.divergence import Side, first_parting
from numerics_suite.observations.roundoff import relative_error

POOLED = 2
"""Number of dimensions of pooled logits."""

EXTRA = 3
"""Columns of padding that are added; one reveals most mistakes, three also make a wrong position more visible."""


@check(batches=True, share=0.5, needs=("token-ids",), adds=EXTRA)
def padding(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Does more padding, on each side that the family declares, leave the real tokens' answers alone?

    No `position_ids` are given: with them an ignored mask would go unseen under left padding.
    """
    # Beyond its longest row a model has no position for a column, or turns all of them by another rotary table.
    if not batch.laws_apply or int(batch.tensors["input_ids"].shape[1]) + EXTRA > context.longest:
        yield from skipped_law()
        return
    rows = telling_rows(batch)
    part = replace(batch, tensors={name: value[rows] for name, value in without_labels(batch.tensors).items()})
    worst, worst_pair = (0.0, 0.0, ""), None
    for plain, more in _pairs(context, part):
        real, where = plain["attention_mask"].bool(), more["attention_mask"].bool()
        moved = true_answer(context, more)[where]
        alone = [lambda answer, plain=plain, real=real: answer(context, plain)[real]]
        shared = [lambda answer, real=real: answer(context, batch.tensors)[rows][real]]
        true, base = agreeing(moved, *(alone if "position_ids" in plain else shared + alone))
        other = plain_answer(context, more)[where]
        found = compare_law(context, true=true, true_other=moved, other=other, base=base)
        if worst_pair is None or nan_last(found[0]) > nan_last(worst[0]):
            worst, worst_pair = found, (plain, more)
    facts = {} if worst_pair is None or worst[0] <= AGREED else _mask_read(context, worst_pair[1])
    yield from law_measurements(
        *worst, place=lambda: None if worst_pair is None else _place(context, *worst_pair), facts=facts
    )
    # Without a pad token the classifier cannot distinguish padding from text: inputs.pipeline reports it.
    if context.subject.task == "sequence-classification" and not context.lacks_pad_token:
        yield from _pooled(context, part)


def _pairs(context: CellContext, batch: Batch) -> list[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The batch, and the batch with more padding, for each side; with `position_ids` if the model counts columns."""
    plain = without_labels(batch.tensors)
    pairs = []
    for side in _sides(context, batch):
        more = padded(batch, side, context.space.pad_id)
        counts = side == "left" and _counts_columns(context, plain, more)
        pairs.append((_with_positions(plain), _with_positions(more)) if counts else (plain, more))
    return pairs


def _counts_columns(context: CellContext, plain: dict[str, Tensor], more: dict[str, Tensor]) -> bool:
    """Whether the model gives each column its own position vector, and padding on the left moves every token by that.

    Then the law holds only with `position_ids`, which `generate` passes. With rotary positions a shift of all
    tokens changes nothing, so there a difference is a finding, whatever `position_ids` would do.
    """
    if not absolute_positions(context.model) or not takes_positions(context.model):
        return False
    base, other = (true_answer(context, tensors)[tensors["attention_mask"].bool()] for tensors in (plain, more))
    return not relative_error(other, base) <= AGREED


def _with_positions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "position_ids": counted_positions(tensors["attention_mask"])}


def _place(context: CellContext, plain: dict[str, Tensor], more: dict[str, Tensor]) -> str | None:
    """The module in which the padded run diverges from the plain one."""

    def run(tensors: dict[str, Tensor]) -> Side:
        real = tensors["attention_mask"].bool()
        call = caller(context, by_token=True)
        return Side(model=context.model, tensors=tensors, call=call, pick=lambda state: state[real])

    return first_parting(run(plain), run(more), passed_over=is_rotary(context))


def _mask_read(context: CellContext, more: dict[str, Tensor]) -> dict[str, Fact]:
    """Whether attention reads the mask at all: the padded batch is run again with a mask that hides nothing.

    `position_ids` are passed if the model takes them, since computing them is another use of the mask.
    """
    where = more["attention_mask"].bool()
    more = _with_positions(more) if takes_positions(context.model) else more
    masked = true_answer(context, more)[where]
    shown = true_answer(context, {**more, "attention_mask": torch.ones_like(more["attention_mask"])})[where]
    same = torch.equal(masked, shown)
    return {
        "flipped at the padding": "the same bit for bit (attention does not read the mask)"
        if same
        else "other ones (the mask is read)"
    }


def _sides(context: CellContext, batch: Batch) -> list[str]:
    """The declared sides on which the batch may be padded further: a row is padded on one side only."""
    mask = batch.tensors["attention_mask"]
    taken = {"left": not bool(mask[:, 0].all()), "right": not bool(mask[:, -1].all())}
    opposite = {"left": "right", "right": "left"}
    return [side for side in context.family.padding_sides if not taken[opposite[side]]]


def padded(batch: Batch, side: str, pad: int) -> dict[str, Tensor]:
    """The batch with :data:`EXTRA` more columns of padding on a side."""
    ids, mask = batch.tensors["input_ids"], batch.tensors["attention_mask"]
    filler = torch.full((ids.shape[0], EXTRA), pad, dtype=ids.dtype)
    nothing = torch.zeros((ids.shape[0], EXTRA), dtype=mask.dtype)
    pairs = (ids, filler), (mask, nothing)
    columns = [torch.cat(pair if side == "right" else pair[::-1], dim=1) for pair in pairs]
    return {"input_ids": columns[0], "attention_mask": columns[1]}


def _pooled(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """The pooled logits under more padding, in true fp64; nothing for logits of each token."""
    pairs = [
        tuple(true_answer(context, tensors, by_token=False) for tensors in pair) for pair in _pairs(context, batch)
    ]
    if any(base.dim() > POOLED for base, _ in pairs):
        return
    errors = [relative_error(other, base) for base, other in pairs]
    worst = next((error for error in errors if error != error), max(errors, default=0.0))
    yield Measurement(name="true-pooled", value=worst, unit="ratio")
