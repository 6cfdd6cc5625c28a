"""Whether a classifier can take a batch of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from numerics_suite.devices.memory import reraise_if_fatal

if TYPE_CHECKING:
    from numerics_suite.engine.cell_context import CellContext

REFUSALS = (ValueError, TypeError, AssertionError, RuntimeError)


def lacks_pad_token(evidence: CellContext) -> bool:
    """Whether the classifier refuses batches because its config names no pad token, by which it finds a row's last one.

    The model itself is asked: it takes one row of one token and refuses two.

    Args:
        evidence: a cell.
    """
    if evidence.subject.task != "sequence-classification" or not evidence.takes_ids:
        return False
    names_one = getattr(evidence.model.config, "pad_token_id", None) is not None
    return not names_one and _takes(evidence, 1) and not _takes(evidence, 2)


def _takes(evidence: CellContext, rows: int) -> bool:
    ids = torch.zeros((rows, 1), dtype=torch.int64)
    try:
        evidence.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    except REFUSALS as error:
        reraise_if_fatal(error)
        return False
    return True
