"""Does a row that its own tokenizer pads get the same output as alone?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Fact, Measurement
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.decoding import counted_positions, takes_positions
from numerics_suite.engine.references import true_answer
from numerics_suite.observations.roundoff import largest_difference, relative_error
from numerics_suite.subjects.generation import names_keyword

MASK = "attention_mask"
GIVEN = ("input_ids", MASK, "position_ids", "token_type_ids")
"""Tensors of a collator, of which a model gets those that its `forward` names."""

COPIES = 2
"""Rows of each call. Both calls have this many equal rows, so that only the padding differs, not the neighbours or a
code path for single rows."""


def padding_moves(context: CellContext, collated: Mapping[str, Any]) -> Measurement | None:
    """How far the tokenizer's padding moves an output, in true fp64; None without padding or such a run.

    The pooled logits of a sequence classifier, the logits of every real token elsewhere. A causal language model gets
    the `position_ids` of `generate`; a classifier gets the collator's tensors, as in training.

    Args:
        context: a cell with finite weights.
        collated: rows of several lengths, as the tokenizer pads them.
    """
    mask = collated.get(MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] > context.longest:
        return None
    lengths = mask.long().sum(dim=1)
    lengths[lengths == mask.shape[1]] = 0
    if not int(lengths.max()):
        return None
    padded = _given(context, collated, int(lengths.argmax()))
    real = padded[MASK][0].bool()
    alone = {name: value[:, real] for name, value in padded.items()}
    by_token = context.subject.task != "sequence-classification"
    try:
        apart = true_answer(context, alone, by_token=by_token)
        answer = true_answer(context, padded, by_token=by_token)
    except NotApplicableError:
        return None
    if not by_token and answer.dim() > 2:  # logits of each token instead of one row: forward.pooling reports it
        return None
    together = answer[:, real] if by_token else answer
    side = "left" if not bool(real[0]) else "right"
    facts: dict[str, Fact] = {
        "side": side,
        "padding": f"{int((~real).sum())} columns on the {side} of a text of {int(real.sum())} tokens",
        "logits move by": largest_difference(together, apart),
    }
    return Measurement(name="padding-moves", value=relative_error(together, apart), unit="ratio", facts=facts)


def _given(context: CellContext, collated: Mapping[str, Any], row: int) -> dict[str, Tensor]:
    """Copies of the row as the model receives it."""
    mask = collated[MASK]
    always = ("input_ids", MASK)
    given = {
        name: collated[name][row : row + 1].repeat(COPIES, 1)
        for name in GIVEN
        if isinstance(collated.get(name), Tensor)
        and collated[name].shape == mask.shape
        and (name in always or names_keyword(context.model, name))
    }
    if context.subject.task == "causal-lm" and takes_positions(context.model):
        given.setdefault("position_ids", counted_positions(given[MASK]))
    return {name: value.to(torch.int64) for name, value in given.items()}
