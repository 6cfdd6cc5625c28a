"""Printers of one run's result: results file and its schema, terminal, plain text; each is a function of `RunResult`."""
