"""The `forward.*` checks."""
