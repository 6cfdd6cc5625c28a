"""Parts of a batch on which a law can be checked as well as on the whole."""

from __future__ import annotations

from numerics_suite.core.records import Batch


def telling_rows(batch: Batch) -> list[int]:
    """Indices of the longest row and of the one with most of both tokens and padding, where masks and positions matter.

    A row of one token would show little: whatever its position, it sees itself. Two rows wherever there are two.
    """
    mask = batch.tensors["attention_mask"]
    lengths, width = mask.sum(dim=1).tolist(), int(mask.shape[1])
    half = max(range(len(lengths)), key=lambda row: (lengths[row] * (width - lengths[row]), row))
    return sorted({lengths.index(max(lengths)), half})


def edge_of_padding(batch: Batch, width: int) -> slice:
    """Columns around the edge of such a row's padding; the first ones without padding.

    Args:
        batch: with an attention mask.
        width: of the part; the whole batch where it is no wider.
    """
    for row in batch.tensors["attention_mask"][telling_rows(batch)].bool():
        edges = (row[1:] != row[:-1]).nonzero()
        if len(edges):
            middle = int(edges[0]) + 1
            start = max(0, min(middle - width // 2, len(row) - width))
            return slice(start, start + width)
    return slice(width)
