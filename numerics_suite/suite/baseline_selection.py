"""Which baselines a run is compared with: where they lie, which cells they have, and what they hold that the run leaves out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from numerics_suite.core.errors import BadInputError
from numerics_suite.settings.sources import find_pyproject
from numerics_suite.settings.tree import COMMAND_LINE, PYTEST, Settings

if TYPE_CHECKING:
    from numerics_suite.baselines.store import Baselines
    from numerics_suite.core.records import Cell, Subject

FOLDER = Path(".numerics/baselines")
"""Looked for in the current folder and beside the nearest pyproject.toml."""

NOWHERE = f"no folder of baselines: --baseline DIR names one, and numerics-suite record writes {FOLDER}"
GROUP = "baseline"


def baselines_of(settings: Settings) -> Baselines | None:
    """The baselines of the folder that was named, or of the one that lies in its usual place; None without any.

    Raises:
        BadInputError: the folder cannot be read, or holds what cannot be used.
    """
    from numerics_suite.baselines.store import load

    folder = settings.baseline or _usual_place()
    return None if folder is None else load(folder)


def _usual_place() -> Path | None:
    project = find_pyproject(Path.cwd())
    places = [Path.cwd(), *([project.parent] if project is not None else [])]
    # A file of that name, or a broken link, looks like a gate to its user: loading it reports what is wrong.
    return next((place / FOLDER for place in places if os.path.lexists(place / FOLDER)), None)


def asks_by_name(settings: Settings) -> bool:
    """Whether `--checks` names the checks of baselines themselves, so that their absence is to be seen."""
    return any(glob.startswith(GROUP) for glob in settings.checks)


def refuse_strangers(settings: Settings, baselines: Baselines, cells: Sequence[Cell]) -> None:
    """See that a folder that was named has to do with this run.

    Raises:
        BadInputError: no cell is in both.
    """
    if settings.baseline is None or any(cell in baselines for cell in cells):
        return
    there = sorted({f"{cell.subject} ({cell.task})" for cell in baselines})
    precisions = sorted({f"{cell.precision}/{cell.attn}/{cell.device}" for cell in baselines})
    message = (
        f"--baseline {settings.baseline}: no cell in common with this run; it holds {', '.join(there)} "
        f"in {', '.join(precisions[:6])}"
    )
    raise BadInputError(message)


def lacking(baselines: Baselines | None, cell: Cell, subject: Subject) -> str | None:
    """Why the cell cannot be compared with a baseline, None where it can."""
    if baselines is None:
        return NOWHERE
    if cell in baselines:
        return None
    return f"{baselines.folder} has no baseline of this cell; numerics-suite record {subject.source} --baseline {baselines.folder}"


def left_out(settings: Settings, baselines: Baselines, cells: Iterable[Cell]) -> tuple[list[str], list[str]]:
    """Lines for subjects of the baselines that the run does not cover: those that only inform, and those that fail it.

    Where the command names the subjects of this run, it leaves out the others on purpose.
    """
    covered = {(cell.subject, cell.task) for cell in cells}
    missing = sorted({(cell.subject, cell.task) for cell in baselines} - covered)
    lines = [f"{subject} ({task}) is in {baselines.folder} and not in this run" for subject, task in missing]
    if settings.origin("subjects") in {COMMAND_LINE, PYTEST}:
        return lines, []
    return [], [f"missing: {line}" for line in lines]
