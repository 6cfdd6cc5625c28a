"""Runs of a model: forward, decoding, training steps, and the reference runs that results are compared with."""
