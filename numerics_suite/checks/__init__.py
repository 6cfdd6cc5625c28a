"""The checks: one question in one file, whose path is its id; each measures and never decides."""
