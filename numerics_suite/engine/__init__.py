"""Runs of a model: forward, decoding, training steps, and the twins that they are judged against."""
