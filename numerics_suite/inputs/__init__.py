"""Inputs of models: Hypothesis strategies for batches, masks, labels and dtypes, and the user's own data."""
