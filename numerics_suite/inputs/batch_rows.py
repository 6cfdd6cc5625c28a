"""Parts of a batch in which what a law is about shows as in the whole."""

from __future__ import annotations

from numerics_suite.core.records import Batch


def telling_rows(batch: Batch) -> list[int]:
    """Numbers of the longest row and of the one that has most of both, tokens and padding: there masks and positions show.

    A row of one token would show little: whatever its position, it sees itself. Two rows wherever there are two.
    """
    mask = batch.tensors["attention_mask"]
    lengths, width = mask.sum(dim=1).tolist(), int(mask.shape[1])
    half = max(range(len(lengths)), key=lambda row: (lengths[row] * (width - lengths[row]), row))
    return sorted({lengths.index(max(lengths)), half})


def edge_of_padding(batch: Batch, width: int) -> slice:
    """So many columns around the one where the padding of such a row ends or begins; the first ones without padding.

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
