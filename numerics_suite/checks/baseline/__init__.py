"""Checks that hold a cell to what was recorded of it."""
