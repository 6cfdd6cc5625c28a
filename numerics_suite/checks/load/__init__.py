"""The `load.*` checks."""
