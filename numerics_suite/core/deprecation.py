"""Old public names that still work, each with a DeprecationWarning that gives the new one."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T", bound=Callable[..., Any])


def warn_renamed(old: str, new: str, *, frames: int) -> None:
    """Warn at the line that uses an old name."""
    warnings.warn(f"{old} is deprecated: use {new}", DeprecationWarning, stacklevel=frames + 2)


def renamed(**names: str) -> Callable[[T], T]:
    """Decorate a function whose keyword arguments, or a class whose attributes and arguments, got new names.

    Args:
        names: new name by old one.
    """

    def decorate(target: T) -> T:
        if not isinstance(target, type):
            return _with_old_arguments(target, names)
        for old, new in names.items():
            setattr(target, old, _old_attribute(old, new))
        target.__init__ = _with_old_arguments(target.__init__, names)  # type: ignore[misc]
        return target

    return decorate


def _with_old_arguments(function: T, names: Mapping[str, str]) -> T:
    @functools.wraps(function)
    def accept(*args: Any, **keywords: Any) -> Any:
        for old in names.keys() & keywords.keys():
            warn_renamed(f"the argument {old}", names[old], frames=1)
            keywords[names[old]] = keywords.pop(old)
        return function(*args, **keywords)

    return accept  # type: ignore[return-value]


def _old_attribute(old: str, new: str) -> property:
    def read(self: object) -> Any:
        warn_renamed(f"{type(self).__name__}.{old}", new, frames=1)
        return getattr(self, new)

    return property(read)
