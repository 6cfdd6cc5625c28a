"""`python -m numerics_suite` is `numerics-suite`."""

from __future__ import annotations

import sys

from numerics_suite.cli.main import entry

if __name__ == "__main__":
    sys.exit(entry())
