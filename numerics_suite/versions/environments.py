"""One environment per version: made by uv, kept in the cache, reused when nothing changed.

An environment is a folder `environments/NAME` of the cache. It counts only with its `environment.json`, written last and in
one step, after torch and transformers were imported there; whatever lacks it is unfinished and made anew. Each attempt
installs into a folder of its own, so that an installer which outlives its killed parent disturbs no other.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.activity import telling
from numerics_suite.core.atomic import write_atomic
from numerics_suite.core.errors import BadInputError, UnsupportedError
from numerics_suite.versions import installation, locks, retention
from numerics_suite.versions.markers import LAYOUT, MARKER, environments_folder, locks_folder, read_marker
from numerics_suite.versions.recipes import Recipe, Wanted, make_recipe
from numerics_suite.versions.self_link import running_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Environment", "Wanted", "ensure"]

_failed: dict[str, str] = {}
"""Reasons by recipe, for this process only: an index may have the version tomorrow."""

_NOT_PASSED_ON = ("VIRTUAL_ENV", "PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONUSERBASE", "__PYVENV_LAUNCHER__", "CONDA_PREFIX")  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """An environment that works.

    Attributes:
        name: of its folder in the cache.
        folder: in the cache.
        python: its interpreter.
        transformers: version as imported there.
        torch: version as imported there, with its local part: `2.13.0+cpu`.
        python_version: of the interpreter.
        made: whether this call made it.
    """

    name: str
    folder: Path
    python: Path
    transformers: str
    torch: str
    python_version: str
    made: bool = False
    _use: locks.Use | None = field(default=None, repr=False, compare=False)

    def command(self, module: str, *arguments: str) -> list[str]:
        """The command line that runs a module there, such as `numerics_suite`."""
        return [str(self.python), "-m", module, *arguments]

    def variables(self) -> dict[str, str]:
        """All variables for a process there: numerics_suite is the running copy, everything else the environment's own."""
        kept = {name: value for name, value in os.environ.items() if name not in _NOT_PASSED_ON}
        path = os.pathsep.join((str(running_copy()), *_harmless_path()))
        return kept | {"PYTHONPATH": path, "PYTHONNOUSERSITE": "1"}

    def release(self) -> None:
        """It may be removed from now on, to make room for others; without this, when the process ends."""
        if self._use is not None:
            self._use.end()


def _harmless_path() -> list[str]:
    """Folders of the user's PYTHONPATH that may hold a factory of theirs, but no package that is under test."""
    folders = [Path(item) for item in os.environ.get("PYTHONPATH", "").split(os.pathsep) if item]
    return [str(folder.absolute()) for folder in folders if not _holds_packages(folder)]


def _holds_packages(folder: Path) -> bool:
    if any((folder / name).is_dir() for name in ("torch", "transformers", "numerics_suite")):
        return True
    return any(folder.glob("*.dist-info"))


def ensure(wanted: Wanted, *, on_progress: Callable[[str], None] | None = None) -> Environment:
    """The environment with the wanted versions, made if it is not there.

    Raises:
        UnsupportedError: the versions cannot be installed together, or not imported; the message is the reason.
        BadInputError: uv is missing, the disk is full, or the cache cannot be written.
    """
    say = on_progress or (lambda _: None)
    recipe = make_recipe(wanted)
    key = recipe.digest
    if key in _failed:
        raise UnsupportedError(_failed[key])
    try:
        return _ensure(recipe, wanted, say)
    except UnsupportedError as error:
        if "no network" not in str(error):
            _failed[key] = str(error)
        raise
    except OSError as error:
        message = (
            f"cannot make an environment in {environments_folder()}: {error.strerror or error}; "
            "numerics-suite cache clean makes room, NUMERICS_SUITE_CACHE names another folder"
        )
        raise BadInputError(message) from None


def _ensure(recipe: Recipe, wanted: Wanted, say: Callable[[str], None]) -> Environment:
    folder = environments_folder() / recipe.name

    def waiting() -> None:
        say(f"waiting for another process that makes {recipe.title}")

    with locks.alone(locks_folder(), recipe.name, waiting):
        marker = read_marker(folder)
        made = marker is None or marker["layout"] != LAYOUT or marker["recipe"] != recipe.to_json()
        if marker is None or made:
            say(f"making an environment: {recipe.title}")
            title = f"making an environment: {recipe.title}"
            with telling(lambda seconds: say(f"{title}: still installing after {seconds:.0f} s"), first=TELL_AFTER):
                marker = _make(recipe, wanted, folder)
        _mark_used(folder)
        environment = _from_marker(folder, marker, made=made, use=locks.Use(locks_folder(), recipe.name))
    if made:
        retention.make_room(say)
    return environment


TELL_AFTER = 15.0
"""Seconds of installing before it is said to go on: torch takes minutes on a slow network."""


def _from_marker(folder: Path, marker: Mapping[str, Any], *, made: bool, use: locks.Use) -> Environment:
    versions = marker["versions"]
    return Environment(
        name=folder.name,
        folder=folder,
        python=folder / marker["python"],
        transformers=versions["transformers"],
        torch=versions["torch"],
        python_version=versions["python"],
        made=made,
        _use=use,
    )


def _mark_used(folder: Path) -> None:
    with contextlib.suppress(OSError):  # a read-only cache can still be used
        os.utime(folder / MARKER)


def _make(recipe: Recipe, wanted: Wanted, folder: Path) -> dict[str, Any]:
    """Make it in a folder of its own, and name that in the marker last."""
    (folder / MARKER).unlink(missing_ok=True)
    for leftover in folder.glob("*") if folder.is_dir() else ():
        shutil.rmtree(leftover, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    attempt = Path(tempfile.mkdtemp(prefix="attempt-", dir=folder))
    started = time.monotonic()
    try:
        python = installation.build(recipe, wanted, attempt)
        versions = installation.import_once(python, recipe)
        marker = {
            "layout": LAYOUT,
            "recipe": recipe.to_json(),
            "python": python.relative_to(folder).as_posix(),
            "versions": versions,
            "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "made_in_s": round(time.monotonic() - started, 3),
            "made_by": sys.version.split()[0],
        }
        write_atomic(folder / MARKER, json.dumps(marker, indent=2) + "\n")
    except BaseException:
        shutil.rmtree(attempt, ignore_errors=True)
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise
    return marker
