"""The batches of a cell: the one it trains on, the one for float64 gradients, and the planned ones that every law is asked of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Batch
from numerics_suite.engine import own_batch
from numerics_suite.engine.position_table import rows_of_position_table
from numerics_suite.engine.rotary import longest_of_one_table
from numerics_suite.inputs.strategies import long_row, planned_batches, training_batch
from numerics_suite.inputs.targets import targets_of
from numerics_suite.inputs.vocabulary import InputSpace, most_rows, pad_id, special_ids
from numerics_suite.subjects import compat

if TYPE_CHECKING:
    from torch import nn

    from numerics_suite.engine.cell_context import CellContext

MOST_ADDED = 3
"""Columns that a law adds to a batch at most: the largest `adds` of all checks."""


def input_space(evidence: CellContext) -> InputSpace:
    """What batches may be drawn.

    Raises:
        NotApplicableError: it takes no token ids.
    """
    if not evidence.takes_ids:
        reason = "a plain module: no token ids can be drawn for it"
        raise NotApplicableError(reason)
    config = compat.config_values(evidence.model)
    pads = pad_id(config)
    return InputSpace(
        vocab_size=evidence.vocab_size,
        pad_id=pads if 0 <= pads < evidence.vocab_size else 0,
        special_ids=special_ids(config, evidence.vocab_size),
        sides=evidence.family.padding_sides,
        task=evidence.subject.task,
        num_labels=evidence.num_labels,
        targets=targets_of(config, evidence.num_labels),
        max_rows=most_rows(evidence.rows),
        max_length=min(evidence.request.length, evidence.longest),
        pools_by_pad=evidence.family.pooling == "pad-id",
    )


def longest_row(model: nn.Module) -> int:
    """Most tokens of a row that config and position table allow, with one rotary table for all lengths."""
    config = compat.config_values(model)
    limits = [config.get(key) for key in ("max_position_embeddings", "seq_length", "n_positions")]
    limits += [longest_of_one_table(config), rows_of_position_table(model)]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=2**31)


def of_training(evidence: CellContext) -> Batch:
    """The fixed batch that the cell trains on; the user's own where there is one with a label that counts."""
    own = evidence.usable_own_batch
    if own is not None and own_batch.can_be_trained_on(evidence, own):
        return own
    return _drawn(evidence, evidence.rows, evidence.space.max_length)


def of_gradients(evidence: CellContext) -> Batch:
    """The batch over which gradients are compared in float64: the training batch, or for a large model one with fewer tokens."""
    shape = evidence.batch_plan.gradient
    if shape is None or not evidence.takes_ids or evidence.training_batch is evidence.usable_own_batch:
        return evidence.training_batch
    return _drawn(evidence, min(shape[0], evidence.rows), min(shape[1], evidence.space.max_length))


def _drawn(evidence: CellContext, rows: int, length: int) -> Batch:
    if evidence.subject.task == "causal-lm":
        # The last token's answer has no label. Of two tokens only the first is trained on, whose attention has one
        # key: its softmax is 1, and queries and keys have no gradient by definition.
        length = max(length, min(3, evidence.longest))
    return training_batch(evidence.space, rows=rows, length=length, seed=evidence.request.seed)


def planned(evidence: CellContext) -> tuple[Batch, ...]:
    """The batches that every check examines, so that their passes are shared; none where Hypothesis draws all of them."""
    plan = evidence.batch_plan
    if plan.planned is None or not evidence.takes_ids:
        return ()
    # Some laws add columns, and every law is asked of the same batches: they leave room for these.
    space, room, seed = evidence.space, evidence.longest - MOST_ADDED, evidence.request.seed
    rows, length = min(plan.planned[0], space.max_rows), max(1, min(plan.planned[1], room))
    batches = planned_batches(space, rows=rows, length=length, seed=seed)
    if not plan.long_row:
        return batches
    config = compat.config_values(evidence.model)
    heads = next((n for key in ("num_attention_heads", "n_head") if isinstance(n := config.get(key), int)), 1)
    longest = long_row(space, room, heads=heads, seed=seed)
    return batches if longest is None else (*batches, longest)
