"""Parts of a batch in which what a law is about shows as in the whole."""

from __future__ import annotations

from numerics_suite.core.records import Batch


def longest_and_shortest(batch: Batch) -> list[int]:
    """Numbers of these rows: what a mask and positions make of a batch shows in the two that differ most.

    Two of them wherever there are two: the last of the shortest.
    """
    lengths = batch.tensors["attention_mask"].sum(dim=1).tolist()
    shortest = max(range(len(lengths)), key=lambda row: (-lengths[row], row))
    return sorted({lengths.index(max(lengths)), shortest})


def edge_of_padding(batch: Batch, width: int) -> slice:
    """So many columns around the one where the padding of the shortest row ends or begins; the first ones without padding.

    Args:
        batch: with an attention mask.
        width: of the part; the whole batch where it is no wider.
    """
    mask = batch.tensors["attention_mask"].bool()
    shortest = mask[int(mask.sum(dim=1).argmin())]
    edges = (shortest[1:] != shortest[:-1]).nonzero()
    middle = int(edges[0]) + 1 if len(edges) else 0
    start = max(0, min(middle - width // 2, len(shortest) - width))
    return slice(start, start + width)
