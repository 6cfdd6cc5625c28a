"""Commands as a reader types them, in bash, with the tool and Python answered by one process that has torch loaded."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What a command line left: its exit status and what it printed, both streams as a terminal shows them."""

    status: int
    printed: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shell:
    """bash in one folder, with the programs of :mod:`preloaded` first on its PATH."""

    folder: Path
    programs: Path

    def run(self, script: str) -> Done:
        """Run lines of bash, which stop at the first that fails.

        Args:
            script: as it stands on the page.
        """
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=self.folder,
            env=environment(self.folder) | {"PATH": f"{self.programs}:/usr/bin:/bin"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=600,
        )
        return Done(status=done.returncode, printed=done.stdout)


def environment(home: Path) -> dict[str, str]:
    """The variables of a new machine without a network: none of this one's settings take part.

    Args:
        home: where programs put what they keep.
    """
    kept = {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}  # the package under test
    return kept | {
        "HOME": str(home.parent),
        "LANG": "C.UTF-8",
        "COLUMNS": "80",
        "NUMERICS_SUITE_NOTICES": "off",  # how long something takes is the machine's affair
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONHASHSEED": "0",
    }
