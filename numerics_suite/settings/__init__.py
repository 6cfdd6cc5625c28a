"""One frozen tree of settings from command line, pytest options and pyproject.toml; each value knows its origin."""
