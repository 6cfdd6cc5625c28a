"""Measurements of one version, kept to compare another version with."""
