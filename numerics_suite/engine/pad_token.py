"""Whether a classifier can take a batch of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from numerics_suite.devices.memory import reraise_if_fatal

if TYPE_CHECKING:
    from numerics_suite.engine.cell_context import CellContext

REFUSALS = (ValueError, TypeError, AssertionError, RuntimeError)


def lacks_pad_token(context: CellContext) -> bool:
    """Whether the classifier refuses batches because its config names no pad token, by which it finds a row's last one.

    This is tried on the model: it takes one row of one token and refuses two.

    Args:
        context: a cell.
    """
    if context.subject.task != "sequence-classification" or not context.takes_ids:
        return False
    names_one = getattr(context.model.config, "pad_token_id", None) is not None
    return not names_one and _takes(context, 1) and not _takes(context, 2)


def _takes(context: CellContext, rows: int) -> bool:
    ids = torch.zeros((rows, 1), dtype=torch.int64)
    try:
        context.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    except REFUSALS as error:
        reraise_if_fatal(error)
        return False
    return True
