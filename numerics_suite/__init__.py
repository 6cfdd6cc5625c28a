"""Numerical regression harness for GLM-4 checkpoints across versions and precisions."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
