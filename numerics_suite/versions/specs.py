"""SPEC: which versions does the user mean?

| form | means |
|---|---|
| `4.51.3,5.23.0` | these |
| `>=4.51,<6`, `~=5.8.0`, `==5.8.*` | every release that the specifier allows |
| `latest`, `latest:5` | the newest, the five newest |
| `minors:>=4.46` | the last patch release of every minor release that the specifier allows; `minors` alone, of all |

Several with `;` between them mean all of theirs. A constraints file of the user's removes what it forbids from every form
but the first: a version that is named is tried, and the installer says why not.
"""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import TYPE_CHECKING

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from numerics_suite.core.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

FORMS = "a list (4.51.3,5.23.0), a specifier (>=4.51,<6) or latest:N (also minors:>=4.46)"


def named(package: str, spec: str) -> list[Version] | None:
    """The versions of a SPEC that is a plain list, oldest first; None for every other form.

    Raises:
        BadInputError: it is of no form.
    """
    if ";" in spec or re.match(r"\s*([<>=!~]|latest\b|minors\b)", spec):
        return None
    return sorted({_version(package, spec, name) for name in spec.split(",")})


def _version(package: str, part: str, name: str) -> Version:
    try:
        return Version(name.strip())
    except InvalidVersion:
        raise _malformed(package, part) from None


def choose(
    package: str,
    spec: str,
    known: Sequence[Version],
    *,
    pre: bool = False,
    may: Callable[[Version], bool] = lambda _: True,
) -> list[Version]:
    """The versions that SPEC means, oldest first.

    Args:
        package: their package, for messages.
        spec: as the user typed it.
        known: the releases there are, pre-releases too, oldest first.
        pre: whether forms other than a list mean pre-releases too.
        may: whether the user's constraints allow a version.

    Raises:
        BadInputError: SPEC is malformed, names a version that does not exist, or means none.
    """
    eligible = [version for version in known if (pre or not version.is_prerelease) and may(version)]
    chosen: set[Version] = set()
    for part in spec.split(";"):
        versions = named(package, part)
        if versions is None:
            versions = _eligible(package, part.strip(), eligible)
        elif unknown := [version for version in versions if version not in known]:
            raise BadInputError(missing(package, unknown[0], known))
        chosen.update(versions)
    return sorted(chosen)


def _eligible(package: str, part: str, eligible: Sequence[Version]) -> list[Version]:
    form, colon, rest = (text.strip() for text in part.partition(":"))
    if form == "latest":
        if colon and not (rest.isdecimal() and int(rest) > 0):
            raise _malformed(package, part)
        versions = list(eligible[-int(rest or 1) :])
    elif form == "minors":
        versions = _last_patches(_by_specifier(package, rest, eligible))
    else:
        versions = _by_specifier(package, part, eligible)
    if not versions:
        message = f"no release of {package} is '{part}'"
        raise BadInputError(message)
    return versions


def _malformed(package: str, part: str) -> BadInputError:
    return BadInputError(f"'{part}' says no versions of {package}: give {FORMS}")


def _by_specifier(package: str, text: str, eligible: Sequence[Version]) -> list[Version]:
    try:
        specifier = SpecifierSet(text)
    except InvalidSpecifier:
        raise _malformed(package, text) from None
    return [version for version in eligible if specifier.contains(version, prereleases=True)]


def _last_patches(versions: Sequence[Version]) -> list[Version]:
    last = {(version.epoch, version.release[:2]): version for version in versions}  # oldest first, so the last stays
    return sorted(last.values())


def missing(package: str, version: Version, known: Sequence[Version]) -> str:
    """One line: the version does not exist, and which one is nearest."""

    def shared(other: Version) -> int:
        alike = [a == b for a, b in zip_longest(other.release, version.release, fillvalue=0)]
        return [*alike, False].index(False)

    stable = [other for other in known if not other.is_prerelease]
    neighbours = [v for v in stable if v < version][-1:] + [v for v in stable if v > version][:1]
    nearest = max(neighbours, key=shared, default=None)  # the earlier one, of two that are as near
    return f"there is no {package} {version} for this Python" + (f"; the nearest is {nearest}" if nearest else "")
