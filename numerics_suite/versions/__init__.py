"""One environment per version: made, run, compared, searched."""
