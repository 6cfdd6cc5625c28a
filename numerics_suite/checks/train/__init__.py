"""The `train.*` checks."""
