"""How often the watch looks and what it keeps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSettings:
    """How often the watch looks and what it keeps; see :func:`watch`."""

    every: int = 1
    every_parameters: int = 20
    snapshot_every: int = 0
    ring: int = 4

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        for name, least in (("every", 1), ("every_parameters", 1), ("snapshot_every", 0), ("ring", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                message = f"watch: {name} must be a whole number of at least {least}, not {value!r}"
                raise ValueError(message)
