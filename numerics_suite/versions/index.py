"""Which releases of a package are there? pip's own finder is asked, as it is set up on this machine.

Alternatives looked at: uv has no command that lists versions; `unearth` and `pypi-simple` are clients that would have to be
told every setting of index, folder, certificate, proxy and password again; PyPI's JSON interface knows nothing of the user's
own index. `pip index versions` reads pip's settings itself, searches indexes and folders alike, knows which files fit the
Python in question, and leaves out yanked ones. Its text has been the same since pip 21.2, so an older pip without `--json` does.
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from numerics_suite.core.errors import BadInputError
from numerics_suite.versions.installers import find_uv, run_quietly
from numerics_suite.versions.pip_settings import PackageSources, package_sources
from numerics_suite.versions.specs import choose, named

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["allowed", "last_patches", "released", "resolve"]


def released(package: str, *, pre: bool = False, python: str | None = None) -> list[Version]:
    """The releases that the user's indexes and folders have for a Python, oldest first; yanked ones are left out.

    A version that is there in several builds (`2.13.0`, `2.13.0+cpu`) is given once, without its build.

    Raises:
        BadInputError: no index knows the package, or none can be reached.
    """
    listing = _ask(package, package_sources(), pre=pre, python=python)
    if listing.unreachable:
        raise BadInputError(_no_network(package, listing.unreachable))
    if not listing.versions:
        message = f"no index or folder of wheels has a release of {package} for {_for(python)}"
        raise BadInputError(message)
    return list(listing.versions)


def _for(python: str | None) -> str:
    return f"Python {python}" if python else "this Python"


def _no_network(package: str, where: str) -> str:
    return (
        f"no network: {where} cannot be asked for the releases of {package}; "
        "UV_NO_INDEX=1 asks the folders of wheels alone, and versions that are named one by one are not looked up"
    )


def allowed(package: str, version: Version) -> bool:
    """Whether the user's constraints files allow the version."""
    return all(
        requirement.specifier.contains(version, prereleases=True)
        for requirement in _constraints(package_sources().constraints)
        if canonicalize_name(requirement.name) == canonicalize_name(package)
    )


def resolve(package: str, spec: str, *, pre: bool = False, python: str | None = None) -> list[str]:
    """The versions that a SPEC means; see `numerics_suite.versions.specs`.

    Raises:
        BadInputError: SPEC is malformed, names a version that does not exist, or means none.
    """
    listing = _ask(package, package_sources(), pre=True, python=python)
    versions = named(package, spec)
    if listing.unreachable and versions is not None:
        return [str(version) for version in versions]  # the installer may have them in its cache, and says so if not
    known = released(package, pre=True, python=python)
    chosen = choose(package, spec, known, pre=pre, may=lambda version: allowed(package, version))
    return [str(version) for version in chosen]


def last_patches(package: str, specifier: str = "", *, pre: bool = False, python: str | None = None) -> list[str]:
    """The last patch release of every minor release that the specifier allows: SPEC `minors:SPECIFIER`."""
    return resolve(package, f"minors:{specifier}", pre=pre, python=python)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Listing:
    """What pip found, and the index that it could not reach, if any: then the list may lack some."""

    versions: tuple[Version, ...]
    unreachable: str


@lru_cache(maxsize=64)
def _ask(package: str, sources: PackageSources, *, pre: bool, python: str | None) -> _Listing:
    arguments = ["index", "versions", package, "-vv", *_options(sources)]
    if pre or sources.pre:
        arguments.append("--pre")
    if python is not None and re.fullmatch(r"\d+(\.\d+){1,2}", python):
        arguments += ["--python-version", python]
    variables = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1", "PYTHONWARNINGS": "ignore"}
    variables.pop("PIP_QUIET", None)
    status, output, complaint = run_quietly([*_pip(), *arguments], variables)
    text = f"{output}\n{complaint}"
    unreachable = re.search(r"Could not fetch URL (\S+?): (?!40[34]|410)", text)
    listed = re.search(r"^Available versions: (.*)$", output, re.MULTILINE)
    if listed is None and unreachable is None and "No matching distribution found" not in text:
        lines = [line for line in complaint.splitlines() if line.startswith("ERROR")] or complaint.splitlines()[-1:]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with status {status}"
        message = f"the releases of {package} cannot be listed: {reason}"
        raise BadInputError(message)
    versions = {_public(name.strip()) for name in listed[1].split(",")} if listed else set()
    found = sorted(version for version in versions if version is not None)
    return _Listing(versions=tuple(found), unreachable=unreachable[1] if unreachable else "")


def _public(text: str) -> Version | None:
    try:
        return Version(Version(text).public)
    except InvalidVersion:  # an old pip lists those too
        return None


def _pip() -> list[str]:
    """The pip of the running environment, else one that uv keeps in its cache."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    quiet = ("--color", "never", "--no-progress")
    alone = ("--isolated", "--no-project", "--python", sys.executable)
    return [find_uv(), *quiet, "run", *alone, "--with", "pip", "python", "-m", "pip"]


def _options(sources: PackageSources) -> Iterator[str]:
    """What pip does not know because it stands in uv's settings."""
    known = sources.known_to_uv
    if "index_url" in known:
        yield from ("--index-url", sources.index_url)
    for name, option in (
        ("extra_index_urls", "--extra-index-url"),
        ("find_links", "--find-links"),
        ("trusted_hosts", "--trusted-host"),
    ):
        if name in known:
            for value in getattr(sources, name):
                yield from (option, value)
    if sources.no_index and "no_index" in known:
        yield "--no-index"


def _constraints(files: tuple[str, ...]) -> Iterator[Requirement]:
    """The lines of constraints files; one at an address is left to the installer."""
    for file in files:
        try:
            with open(file.removeprefix("file://"), encoding="utf-8") as text:  # noqa: PTH123 - may be no path
                lines = text.read().splitlines()
        except OSError:
            continue
        for line in lines:
            try:
                requirement = Requirement(line.partition(" #")[0].strip())
            except InvalidRequirement:  # a comment, an option, nothing
                continue
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement
