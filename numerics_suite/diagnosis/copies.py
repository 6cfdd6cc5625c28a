"""Copies of a cell, on which experiments are made and remedies tried."""

from __future__ import annotations

from numerics_suite.devices import memory
from numerics_suite.engine.cell_context import CellContext


def discard(copy: CellContext) -> None:
    """Drop a copy for good, its model too: reference cycles would keep a large one beside every later copy."""
    copy.release()
    large = copy.holds_large_model
    for name in ("runner", "loaded"):
        copy.__dict__.pop(name, None)
    if large:
        memory.release(copy.cell.device)
