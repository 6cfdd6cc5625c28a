"""`python -m numerics_suite` is `numerics-suite`."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

if __name__ == "__main__":
    # `-m` puts the current folder first on the path, where a stranger's checkpoint may lie beside a module named like one
    # of ours. The package itself may lie there too.
    with contextlib.suppress(FileNotFoundError):  # the folder is gone
        here = str(Path.cwd())
        if sys.path and sys.path[0] in {"", here} and here != str(Path(__file__).parents[1]):
            del sys.path[0]

    from numerics_suite.cli.main import entry

    sys.exit(entry())
