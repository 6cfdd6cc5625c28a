"""What lives already is set aside from garbage collections that other packages ask for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def living_set_aside() -> Iterator[None]:
    """Within it the garbage collector looks at new objects only.

    pytest collects ten times as it ends and the Trainer as it begins; each would walk over the objects of torch and
    transformers, a million of them. Within another, or in a process that froze its objects itself, it changes nothing:
    what a cell holds must not be set aside until the run ends.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
