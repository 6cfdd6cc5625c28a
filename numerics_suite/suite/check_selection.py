"""Which checks does a run ask? Known without torch, so that a matrix refuses a mistake before it installs anything."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.registry import check_ids
from numerics_suite.settings.tree import Settings


def selected_checks(settings: Settings) -> tuple[str, ...]:
    """Ids of the checks that `--checks` names and `--skip` leaves.

    Raises:
        BadInputError: none is left.
    """

    def named(check: str, globs: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(check, glob) for glob in globs)

    known = check_ids()
    for glob in settings.checks:
        if not any(named(check, (glob,)) for check in known):
            message = f"--checks {glob}: only checks of other packages match it, and extensions are off"
            raise BadInputError(message)
    wanted = tuple(
        check
        for check in known
        if (not settings.checks or named(check, settings.checks)) and not named(check, settings.skip)
    )
    if not wanted:
        message = "--checks and --skip leave no check to run"
        raise BadInputError(message)
    return wanted
