"""Copies of a cell, on which experiments are made and remedies tried."""

from __future__ import annotations

from numerics_suite.devices import memory
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.true_passes import keeps_gradients


def discard(copy: CellContext) -> None:
    """Drop a copy for good, its model too: reference cycles would keep a large one beside every later copy."""
    copy.release()
    held = copy.__dict__
    held.pop("runner", None)
    if "loaded" in held and not keeps_gradients(held.pop("loaded").model):
        memory.release(copy.cell.device)
