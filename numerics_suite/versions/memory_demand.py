"""How much memory will one environment of a matrix need? Its plan says, which this file makes in a process of its own.

The process that follows a matrix never imports torch, and the plan needs it: `python -m numerics_suite.versions.memory_demand < SETTINGS`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from numerics_suite.core.errors import BadInputError
from numerics_suite.reports.results import dump
from numerics_suite.settings.tree import Settings, to_json
from numerics_suite.versions.job import settings_from_json
from numerics_suite.versions.jobs import RunningEnvironment, rough_bytes

MODULE = "numerics_suite.versions.memory_demand"

PROCESS_BYTES = 200_000_000
"""Beside what a cell holds: of pages of libraries' files, and of the process that waits for it."""

MOST_SECONDS = 120
"""A plan takes seconds; where a subject's code never returns, sizes are guessed."""


def memory_demand(settings: Settings, weight_bytes: int, cwd: Path) -> int:
    """Bytes that the process of one environment will need at its peak.

    Where no plan can be made here (the installed transformers may lack a family that another release has), or where it knows
    nothing of a size, the files' own size decides.

    Args:
        settings: of a cell.
        weight_bytes: of the largest subject's files.
        cwd: the folder of the command.
    """
    here = RunningEnvironment()
    try:
        done = subprocess.run(  # noqa: S603 - our own command
            here.command(MODULE),
            input=dump(to_json(settings)),
            env=here.variables(),
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=MOST_SECONDS,
            check=True,
        )
        return int(done.stdout.split()[-1])  # a subject's code may print too
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return rough_bytes(weight_bytes)


def planned_bytes(settings: Settings) -> int | None:
    """The most that a cell of the plan needs with its process; None where that is not known for each of them."""
    from numerics_suite.devices.kinds import CPU, kind_of
    from numerics_suite.suite.run import planned

    rows, _ = planned(replace(settings, list_only=True))
    # Of another device the estimate is of that device's own memory, and says nothing of the node's.
    sizes = [row.bytes if kind_of(row.cell.device) == CPU else None for row in rows]
    known = [size for size in sizes if size is not None]
    return PROCESS_BYTES + max(known) if known and len(known) == len(sizes) else None


def main() -> int:
    """Print the bytes, or end with 1 where nothing is known."""
    try:
        size = planned_bytes(settings_from_json(json.load(sys.stdin)))
    except BadInputError:
        size = None
    if size is None:
        return 1
    sys.stdout.write(f"{size}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
