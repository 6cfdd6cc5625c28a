"""Files that are there whole or not at all; the stages before this one write such files too."""

from __future__ import annotations

from numerics_suite.core.atomic import ensure_writable, write_atomic

__all__ = ["ensure_writable", "write_atomic"]
