"""Measurements of a run: finiteness, error in unit roundoffs, headroom, and where in the model."""
