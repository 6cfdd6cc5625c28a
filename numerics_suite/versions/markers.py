"""Where environments lie, and what says that one is finished."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from numerics_suite.subjects.fixtures import cache_dir

if TYPE_CHECKING:
    from pathlib import Path

MARKER = "environment.json"
"""Written last and in one step; its time of change is the time of the last use."""

LAYOUT = 1
"""Raised when what makes an environment changes, so that older ones are made anew."""


def environments_folder() -> Path:
    """The folder of all environments."""
    return cache_dir() / "environments"


def locks_folder() -> Path:
    """The folder of their locks, which stay when an environment goes."""
    return cache_dir() / "locks"


def read_marker(folder: Path) -> dict[str, Any] | None:
    """What is known of a finished environment; None for an unfinished or broken one."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        complete = {"layout", "recipe", "python", "versions", "made_at"} <= set(marker)
    except (OSError, ValueError, TypeError):
        return None
    return marker if complete and (folder / marker["python"]).exists() else None
