"""Environments of other versions hold the suite and what it needs, and no extension: what that leaves of a command."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import replace

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.extensions import extension_versions
from numerics_suite.core.registry import own_check_ids
from numerics_suite.settings.tree import Settings

WHY = "environments of other versions hold none of the packages that add something"


def without_extensions(settings: Settings) -> Settings:
    """The settings without the globs that only other packages' checks match, which are unknown there.

    Raises:
        BadInputError: no check is left.
    """
    checks = _ours(settings.checks)
    if settings.checks and not checks:
        message = f"{', '.join(settings.checks)}: {WHY}; numerics-suite check asks it here"
        raise BadInputError(message)
    return replace(
        settings,
        checks=checks,
        skip=_ours(settings.skip),
        accept=tuple(entry for entry in settings.accept if _ours((entry.check,))),
    )


def _ours(globs: Iterable[str]) -> tuple[str, ...]:
    return tuple(glob for glob in globs if any(fnmatch.fnmatchcase(check, glob) for check in own_check_ids()))


def left_out_notes() -> tuple[str, ...]:
    """A line for a person where something is installed here that takes no part there; else none."""
    named = ", ".join(f"{name} {version}" for name, version in extension_versions().items())
    return (f"without {named}: {WHY}",) if named else ()
