"""forward.packing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from numerics_suite.checks._laws import UNSUPPORTED, is_rotary, law_measurements, skipped_law
from numerics_suite.checks.forward.cache import window_of
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Batch, Fact, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.packed_rows import WORDS, Way, packed, padded_rows, row_alone, ways_of
from numerics_suite.engine.references import Answer, agreeing, caller, compare_law, plain_answer, true_answer
from numerics_suite.observations.divergence import Side, first_parting
from numerics_suite.observations.roundoff import relative_error

MOST_ROWS, MOST_TOKENS = 3, 24
"""Rows and tokens that are packed: a leak needs two rows, and shows in the first tokens of the second."""


@check(batches=True, share=0.2, needs=("token-ids",))
def packing(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Do packed rows give the outputs of separate rows, in each way that the installed release supports?

    The rows alone are compared with the same rows end to end, separated by `position_ids` that start again (without a
    mask and without a cache), by FlashAttention's `cu_seqlens`, or by a block-diagonal mask; see
    :mod:`numerics_suite.engine.packed_rows`.
    """
    if not context.family.causal:
        reason = "an encoder: its tokens see both sides"
        raise NotApplicableError(reason)
    ways = ways_of(context)
    if not ways.asked:
        raise NotApplicableError(ways.left_out)
    rows = _rows(context, batch)
    if not batch.laws_apply or len(rows) < 2:
        yield from skipped_law()
        return
    for way in ways.asked:
        yield from _law(context, batch, _within_window(context, rows, way), way, ways.left_out)


def _law(context: CellContext, batch: Batch, rows: list[Tensor], way: Way, left_out: str) -> Iterable[Measurement]:
    together = padded_rows(rows, context) if way == "rows" else packed(rows, way, context.model)
    packs = _tokens(true_answer(context, together), together, way)
    true, base = agreeing(
        packs,
        lambda answer_of: _in_batch(context, batch, rows, answer_of),
        lambda answer_of: _alone(context, rows, answer_of),
    )
    other = _tokens(plain_answer(context, together), together, way)
    found = compare_law(context, true=true, true_other=packs, other=other, base=base)
    facts: dict[str, Fact] = {"packed by": WORDS[way]}
    facts |= {UNSUPPORTED: left_out} if left_out else {}
    yield from law_measurements(*found, place=lambda: _place(context, rows, true, together, way), facts=facts)


def _alone(context: CellContext, rows: list[Tensor], answer_of: Answer) -> Tensor:
    """`[tokens, …]` of all rows, each run alone."""
    return torch.cat([answer_of(context, row_alone(row, context))[0] for row in rows])


def _in_batch(context: CellContext, batch: Batch, rows: list[Tensor], answer_of: Answer) -> Tensor:
    """The same, taken from the passes over the batch that every law reads: its rows begin with these tokens."""
    answers, mask = answer_of(context, batch.tensors), batch.tensors["attention_mask"].bool()
    found = [answer[real] for answer, real in zip(answers, mask, strict=True) if bool(real.any())]
    if len(found) < len(rows):  # the first of them is not the batch's
        return _alone(context, rows, answer_of)
    return torch.cat([answer[: len(row)] for answer, row in zip(found, rows, strict=False)])


def _within_window(context: CellContext, rows: list[Tensor], way: Way) -> list[Tensor]:
    """A custom mask also replaces a sliding window's mask, so the two agree only within the window."""
    window = window_of(context) if way == "block-mask" else None
    return [row[:window] for row in rows]


def _rows(context: CellContext, batch: Batch) -> list[Tensor]:
    """The first tokens of the first rows; a batch of one row is packed behind the same row with other tokens."""
    ids, mask = batch.tensors["input_ids"], batch.tensors["attention_mask"].bool()
    count = min(max(len(ids), 2), MOST_ROWS)
    most = min(MOST_TOKENS, context.longest // count)
    rows = [row[real][:most] for row, real in zip(ids[:MOST_ROWS], mask[:MOST_ROWS], strict=True)]
    if len(rows) == 1:
        other = (rows[0] + 1) % context.vocab_size
        rows = [torch.where(other == context.space.pad_id, (other + 1) % context.vocab_size, other), *rows]
    return [row for row in rows if len(row)]


def _tokens(answer: Tensor, tensors: dict[str, Tensor], way: Way) -> Tensor:
    """`[tokens, …]` of all rows, one row after the other."""
    return answer[tensors["attention_mask"].bool()] if way == "rows" else answer[0]


def _place(context: CellContext, rows: list[Tensor], true: Tensor, together: dict[str, Tensor], way: Way) -> str | None:
    """The module in which the packed run diverges from the padded rows; None if padding changes their outputs too."""
    plain = padded_rows(rows, context)
    if way == "rows" or not relative_error(_tokens(true_answer(context, plain), plain, "rows"), true) <= AGREED:
        return None
    one, other = (
        Side(
            model=context.model,
            tensors=tensors,
            call=caller(context, by_token=True),
            pick=lambda state, tensors=tensors, how=how: _tokens(state, tensors, how),  # type: ignore[misc]
        )
        for tensors, how in ((plain, "rows"), (together, way))
    )
    return first_parting(one, other, passed_over=is_rotary(context))
