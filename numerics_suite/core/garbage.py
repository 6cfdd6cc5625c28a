"""What lives already is set aside from garbage collections that other packages ask for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_set_aside = False
"""`gc.get_freeze_count()` would say so too, at the price of a collection: it counts them."""


@contextmanager
def living_set_aside() -> Iterator[None]:
    """Within it the garbage collector looks at new objects only.

    pytest collects ten times as it ends and the Trainer as it begins; each would walk over the objects of torch and
    transformers, hundreds of thousands. Within another it changes nothing: what a cell holds must not be set aside until
    the run ends.
    """
    global _set_aside  # noqa: PLW0603 - so are the collector's own lists
    if _set_aside:
        yield
        return
    _set_aside = True
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        _set_aside = False


def set_rest_aside() -> None:
    """Within :func:`living_set_aside`, set aside what has come to live since, such as packages that a cell imported.

    Call it between two cells, after a collection: what is set aside now and becomes a cycle later stays until the run ends.
    """
    if _set_aside:
        gc.freeze()


@contextmanager
def none_collected() -> Iterator[None]:
    """Within it no collection begins by itself: what an import makes stays, and looking through it is a second of torch's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
