"""Absolute positions: a vector for each place in a row, learned or a sinusoid, that is added to the input."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = re.compile(r"(^|\.)(position_embeddings?|embed_positions|positions_embed|pos_emb\w*|wpe)$")
"""Names of modules that hold a vector for each position; rotary embeddings have other names."""


def absolute_positions(model: nn.Module) -> bool:
    """Whether the model adds a vector for each position, learned or a sinusoid, to its input."""
    return any(True for _ in _tables(model))


def rows_of_position_table(model: nn.Module) -> int | None:
    """Most tokens of a row that fit a position table with a padding row; None without such a table.

    RoBERTa counts from the row behind the one of padding, so that 514 places are 512 tokens (`create_position_ids_from_input_ids`).
    """
    learned = (table for table in _tables(model) if isinstance(table, nn.Embedding))
    rows = (table.num_embeddings - table.padding_idx - 1 for table in learned if table.padding_idx is not None)
    return min(rows, default=None)


def _tables(model: nn.Module) -> Iterator[nn.Module]:
    return (module for name, module in model.named_modules() if NAME.search(name))
