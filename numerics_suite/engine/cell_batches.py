"""The batches of a cell: the one it trains on, the one for float64 gradients, and the planned ones that every law is checked on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Batch
from numerics_suite.engine import own_batch
from numerics_suite.engine.position_table import rows_of_position_table
from numerics_suite.engine.rotary import longest_of_one_table
from numerics_suite.inputs.effort import Shape
from numerics_suite.inputs.strategies import long_row, planned_batches, training_batch
from numerics_suite.inputs.targets import targets_of
from numerics_suite.inputs.vocabulary import InputSpace, most_rows, pad_id, special_ids
from numerics_suite.subjects import compat

if TYPE_CHECKING:
    from torch import nn

    from numerics_suite.engine.cell_context import CellContext

MOST_ADDED = 3
"""Columns that a law adds to a batch at most: the largest `adds` of all checks."""


def input_space(context: CellContext) -> InputSpace:
    """What batches may be drawn.

    Raises:
        NotApplicableError: it takes no token ids.
    """
    if not context.takes_ids:
        reason = "a plain module: no token ids can be drawn for it"
        raise NotApplicableError(reason)
    config = compat.config_values(context.model)
    pads = pad_id(config)
    return InputSpace(
        vocab_size=context.vocab_size,
        pad_id=pads if 0 <= pads < context.vocab_size else 0,
        special_ids=special_ids(config, context.vocab_size),
        sides=context.family.padding_sides,
        task=context.subject.task,
        num_labels=context.num_labels,
        targets=targets_of(config, context.num_labels),
        max_rows=most_rows(context.rows),
        max_length=min(context.request.length, context.longest),
        pools_by_pad=context.family.pooling == "pad-id",
    )


def longest_row(model: nn.Module) -> int:
    """Most tokens of a row that config and position table allow, with one rotary table for all lengths."""
    config = compat.config_values(model)
    limits = [config.get(key) for key in ("max_position_embeddings", "seq_length", "n_positions")]
    limits += [longest_of_one_table(config), rows_of_position_table(model)]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=2**31)


def of_training(context: CellContext) -> Batch:
    """The fixed batch that the cell trains on; the user's own where there is one with a label that counts."""
    own = context.usable_own_batch
    if own is not None and own_batch.can_be_trained_on(context, own):
        return own
    return _within(context, context.batch_plan.training or (context.rows, context.space.max_length))


def of_gradients(context: CellContext) -> Batch:
    """The batch over which gradients are compared in float64: the training batch, or for a large model one with fewer tokens."""
    shape = context.batch_plan.gradient
    if shape is None or not context.takes_ids or context.training_batch is context.usable_own_batch:
        return context.training_batch
    return _within(context, shape)


def _within(context: CellContext, shape: Shape) -> Batch:
    """A batch of this shape, as far as `--batch-size`, `--seq-len` and the model allow."""
    rows, length = min(shape[0], context.rows), min(shape[1], context.space.max_length)
    if context.subject.task == "causal-lm":
        # The last token's answer has no label. Of two tokens only the first is trained on, whose attention has one
        # key: its softmax is 1, and queries and keys have no gradient by definition.
        length = max(length, min(3, context.longest))
    return training_batch(context.space, rows=rows, length=length, seed=context.request.seed)


def planned(context: CellContext) -> tuple[Batch, ...]:
    """The batches that every check examines, so that their passes are shared; none where Hypothesis draws all of them."""
    plan = context.batch_plan
    if plan.planned is None or not context.takes_ids:
        return ()
    # Some laws add columns, and all laws share batches, so the batches leave room for these.
    space, room, seed = context.space, context.longest - MOST_ADDED, context.request.seed
    rows, length = min(plan.planned[0], space.max_rows), max(1, min(plan.planned[1], room))
    batches = planned_batches(space, rows=rows, length=length, seed=seed)
    if not plan.long_row:
        return batches
    config = compat.config_values(context.model)
    heads = next((n for key in ("num_attention_heads", "n_head") if isinstance(n := config.get(key), int)), 1)
    longest = long_row(space, room, heads=heads, seed=seed)
    return batches if longest is None else (*batches, longest)
