"""The `inputs.*` checks."""
