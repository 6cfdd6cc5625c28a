"""The `reference.*` checks."""
