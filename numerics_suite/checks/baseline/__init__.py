"""Checks that compare a cell with its recorded baseline."""
