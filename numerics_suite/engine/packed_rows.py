"""Rows packed into one row: the ways to mark where each of them ends, and which of these the model's code supports.

A padding-free collator lays the rows of a batch end to end and separates them in one of these ways:

- `position_ids` that start again at every row, no mask and no cache. transformers builds the masks from them from 4.53.1 on.
- their offsets as FlashAttention takes them, `cu_seq_lens_q` and `cu_seq_lens_k`, beside the `position_ids`.
- a block-diagonal mask `[1, 1, tokens, tokens]`, added to the scores: 0 where a token sees another, the dtype's minimum elsewhere. Only an
  added one holds in every attention: eager attention adds a boolean mask as numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from numerics_suite.core.exact import AGREED
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.decoding import counted_positions, takes_positions
from numerics_suite.engine.references import true_answer
from numerics_suite.inputs.strategies import pad_rows
from numerics_suite.observations.roundoff import relative_error
from numerics_suite.subjects import compat, generation

Way = Literal["position_ids", "cu_seqlens", "block-mask", "rows"]

WORDS: dict[str, str] = {
    "position_ids": "position_ids that start again",
    "cu_seqlens": "cu_seqlens for flash attention",
    "block-mask": "a block-diagonal 4-D attention_mask",
    "rows": "rows of their own, padded",
}
"""Each way in words; the last one is what packing is compared with, and the advice where no way works."""

REFUSALS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError)
"""Exceptions of code that does not support a way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """How rows may be packed for one model.

    Attributes:
        asked: those that its code supports.
        left_out: why `position_ids`, which collators use, are not among them, and what to use instead; "" if they are.
    """

    asked: tuple[Way, ...]
    left_out: str = ""


def packed(rows: Sequence[Tensor], way: Way, model: nn.Module) -> dict[str, Any]:
    """What the model is called with for rows that are packed into one row.

    Args:
        rows: ids of each, without padding.
        way: how row ends are marked; not `rows`.
        model: a mask has its dtype.
    """
    lengths = torch.tensor([len(row) for row in rows])
    tensors: dict[str, Any] = {"input_ids": torch.cat(list(rows))[None]}
    if takes_positions(model):
        tensors["position_ids"] = torch.cat([torch.arange(len(row)) for row in rows])[None]
    if way == "cu_seqlens":
        edges = nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths.max())
        tensors |= {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges, "max_length_q": longest, "max_length_k": longest}
    if way == "block-mask":
        row_of = torch.arange(len(rows)).repeat_interleave(lengths)
        seen = (row_of[:, None] == row_of[None]).tril()
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
        tensors["attention_mask"] = mask[None, None]
    return tensors


def padded_rows(rows: Sequence[Tensor], context: CellContext) -> dict[str, Tensor]:
    """The same rows each in a row of its own, padded on a side that the family declares."""
    lists = [row.tolist() for row in rows]
    ids, mask = pad_rows(lists, context.family.padding_sides[0], context.space.pad_id)
    return _told({"input_ids": ids, "attention_mask": mask}, context.model)


def row_alone(row: Tensor, context: CellContext) -> dict[str, Tensor]:
    """One row alone, with the same explicit positions: a model's own may start elsewhere (RoBERTa's do)."""
    ids = row[None]
    return _told({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, context.model)


def _told(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return tensors | ({"position_ids": counted_positions(tensors["attention_mask"])} if takes_positions(model) else {})


def ways_of(context: CellContext) -> Ways:
    """How rows may be packed for the cell's model.

    For known families the installed release alone decides. Any other class is tried on two rows: it supports
    `position_ids` if they have any effect on its masks, and the other ways if they separate the two rows.
    """
    if context.request.packing:
        return Ways(asked=context.request.packing)  # type: ignore[arg-type]
    return context.cached(_ways)


def _ways(context: CellContext) -> Ways:
    flash = context.loaded.attn.startswith("flash_attention")
    known = context.family.packs and not flash
    release = compat.packs_by_positions() if known else _separates(context)
    asked: list[Way] = ["position_ids"] if release else []
    other: Way = "cu_seqlens" if flash else "block-mask"
    if known or _separates_wholly(context, other):
        asked.append(other)
    if release:
        return Ways(asked=tuple(asked))
    who = f"transformers {compat.version()}" if known else type(context.model).__name__
    if not asked:
        reason = (
            f"{who} keeps packed rows apart neither by position_ids nor by {WORDS[other]}; train on {WORDS['rows']}"
        )
        return Ways(asked=(), left_out=reason)
    later = " (4.53.1 and newer do)" if known else ""
    return Ways(
        asked=tuple(asked),
        left_out=f"{who} does not keep packed rows apart by position_ids{later}; {WORDS[other]} does",
    )


def _two_rows(context: CellContext) -> list[Tensor]:
    """Three tokens and two others, none of them padding."""
    pad, size = context.space.pad_id, context.vocab_size
    ids = torch.tensor([token for token in range(min(size, 6)) if token != pad])
    return [ids[:3], ids[-2:]]


def _separates(context: CellContext) -> bool:
    """Whether `position_ids` change the masks that the model makes when it gets none.

    A recurrent state crosses row ends whatever the masks are.
    """
    if not takes_positions(context.model) or generation.is_stateful(context.model):
        return False
    told = packed(_two_rows(context), "position_ids", context.model)
    whole = told | {"attention_mask": torch.ones_like(told["input_ids"])}
    try:
        return not relative_error(true_answer(context, told), true_answer(context, whole)) <= AGREED
    except REFUSALS:
        return False


def _separates_wholly(context: CellContext, way: Way) -> bool:
    rows = _two_rows(context)
    alone = torch.cat([true_answer(context, row_alone(row, context))[0] for row in rows])
    try:
        together = true_answer(context, packed(rows, way, context.model))[0]
        return relative_error(together, alone) <= AGREED
    except REFUSALS:
        return False
