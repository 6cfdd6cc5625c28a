"""The suite: checks × cells as pytest items; `pytest --pyargs numerics_suite.suite` and `numerics-suite check` run it."""
