"""What other packages add through entry points: names are listed without importing them, a value is loaded on demand.

A package that adds something is an extension. What it adds is named in its own metadata, in one of :data:`GROUPS`; a name
that cannot be used, or a value that cannot be loaded, is an error that says whose it is, and never a silent skip.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.switch import OFF, SWITCH, switched_on

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from importlib.metadata import EntryPoint

CHECKS, FAMILIES, REMEDIES, REPORTERS = (
    f"numerics_suite.{kind}" for kind in ("checks", "families", "remedies", "reporters")
)
GROUPS = (CHECKS, FAMILIES, REMEDIES, REPORTERS)
"""Groups of entry points, each with a kind of thing that can be added."""

OWN_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*\.[a-z0-9]+(-[a-z0-9]+)*")
"""A name of a third party: its prefix, a dot, and the name. Ours have no dot, but for check ids, whose groups are listed."""

PLAIN_NAME = re.compile(r"[a-z][a-z0-9]*([._-][a-z0-9]+)*")
"""Of a family, which is called as the architecture is, and of a reporter, whose name stands in no results."""

CURE = f"repair or uninstall it, or leave all extensions out with --no-extensions ({SWITCH}={OFF})"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """One thing that a package adds, not loaded yet.

    Attributes:
        group: one of :data:`GROUPS`.
        name: of the entry point; what is added is called by it.
        entry: of the package's metadata.
    """

    group: str
    name: str
    distribution: str
    version: str
    entry: EntryPoint = field(repr=False)

    def __str__(self) -> str:
        """Whose entry it is, for a message."""
        return f"extension {self.distribution} {self.version}: entry point '{self.name}' of {self.group}"

    def refuse(self, why: str) -> NoReturn:
        """Say that it cannot be used.

        Raises:
            BadInputError: always.
        """
        message = f"{self}: {why}; {CURE}"
        raise BadInputError(message)


@cache
def _installed() -> tuple[Extension, ...]:
    """Every entry of every group, in an order that does not depend on where packages lie."""
    # Here and not above: it takes longer to import than all else that `--help` needs.
    from importlib.metadata import entry_points

    everything = entry_points()
    found = [
        Extension(
            group=group,
            name=entry.name,
            distribution=entry.dist.name if entry.dist is not None else "(unknown)",
            version=entry.dist.version if entry.dist is not None else "(unknown)",
            entry=entry,
        )
        for group in GROUPS
        for entry in everything.select(group=group)
    ]
    return tuple(sorted(found, key=lambda one: (GROUPS.index(one.group), one.name, one.distribution)))


def installed_names(group: str) -> tuple[str, ...]:
    """Names of a group, whether extensions are on or off and whether each can be used: what a user may mean."""
    return tuple(dict.fromkeys(one.name for one in _installed() if one.group == group))


def extensions(group: str, *, taken: Collection[str] = ()) -> Mapping[str, Extension]:
    """What is added to a group, by name, in the order of the names; nothing where extensions are off.

    Args:
        group: one of :data:`GROUPS`.
        taken: names of ours: of a check the group of its id, elsewhere the whole name.

    Raises:
        BadInputError: a name is malformed, one of ours, or given twice.
    """
    if not switched_on():
        return {}
    pattern = OWN_NAME if group in {CHECKS, REMEDIES} else PLAIN_NAME
    found: dict[str, Extension] = {}
    for one in _installed():
        if one.group != group:
            continue
        if not pattern.fullmatch(one.name):
            wanted = "PREFIX.NAME, as in acme.logit-range" if pattern is OWN_NAME else "lower-case letters and digits"
            one.refuse(f"the name must be {wanted}")
        if one.name in taken or (group == CHECKS and one.name.partition(".")[0] in taken):
            one.refuse("the name is one of numerics-suite's own")
        if one.name in found:
            other = found[one.name]
            one.refuse(f"{other.distribution} {other.version} has an entry of that name too")
        found[one.name] = one
    return found


@cache
def load(extension: Extension) -> Any:
    """The value of an entry point.

    Raises:
        BadInputError: its module cannot be imported, or has no such name.
    """
    try:
        return extension.entry.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever happens while another's module is imported
        why = " ".join(str(error).split())[:200]
        extension.refuse(f"{extension.entry.value} cannot be loaded: {type(error).__name__}: {why}")


def load_as(extension: Extension, kind: type[T]) -> T:
    """The value of an entry point, seen to be of a kind.

    Raises:
        BadInputError: as :func:`load`, or it is something else.
    """
    value = load(extension)
    if not isinstance(value, kind):
        extension.refuse(f"{extension.entry.value} is of type {type(value).__name__}, and must be {kind.__name__}")
    return value


def extension_versions() -> dict[str, str]:
    """Distributions that add something to this run, with their versions; none where extensions are off."""
    if not switched_on():
        return {}
    return {one.distribution: one.version for one in sorted(_installed(), key=lambda one: one.distribution.lower())}
