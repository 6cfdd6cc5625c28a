"""An attribute that has another value for a while; standard library only."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextlib.contextmanager
def with_attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """Within it the attribute of an object, a class or a module has this value; None stands for one that was absent."""
    before = getattr(owner, name, None)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
