"""What is in an environment? What was wanted, with every blank filled in; equal recipes are one environment."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from numerics_suite.core.errors import BadInputError, UnsupportedError
from numerics_suite.settings.sources import read_toml
from numerics_suite.versions.pip_settings import PackageSources, package_sources

if TYPE_CHECKING:
    from collections.abc import Iterator

DISTRIBUTION = "numerics-suite"
UNDER_TEST = ("torch", "transformers")
OPTIONAL = ("accelerate", "peft")
"""What an environment has where the running one has it."""


MAKERS = frozenset({"filelock", "uv"})
"""What makes environments and is of no use in one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """The versions asked for.

    Attributes:
        transformers: a release; None for the running one.
        torch: a release; None for the running one.
        python: `3.12`, `3.12.1` or an interpreter's path; None for the running one.
        others: name and release of other packages, by name.
        transformers_source: a git checkout of transformers to build instead of a release.
        transformers_commit: the commit of it; the working tree does not matter.
    """

    transformers: str | None = None
    torch: str | None = None
    python: str | None = None
    others: tuple[tuple[str, str], ...] = ()
    transformers_source: Path | None = None
    transformers_commit: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What an environment is made of, and therefore what it is known by.

    Attributes:
        python: version or path, for uv.
        torch: a release.
        transformers: a release, or `git-COMMIT`.
        requirements: of numerics-suite, without these two.
        sources: where packages come from.
        platform: system, machine and C library.
        others: name and release of the packages of `requirements` that the user chose.
    """

    python: str
    torch: str
    transformers: str
    requirements: tuple[str, ...]
    sources: PackageSources
    platform: str
    others: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """A folder's name: the versions to read, and a digest of all."""
        versions = (("py", self.python), ("torch", self.torch), ("tf", self.transformers[:16]))
        readable = "-".join(f"{name}{re.sub('[^0-9A-Za-z.+]+', '_', value)[-40:]}" for name, value in versions)
        return f"{readable}-{self.digest[:10]}"

    @property
    def digest(self) -> str:
        """SHA-256 of everything."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @property
    def title(self) -> str:
        """For a person."""
        others = "".join(f", {name} {version}" for name, version in self.others)
        return f"transformers {self.transformers}, torch {self.torch}, Python {self.python}{others}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; a constraints file by its content."""
        values = asdict(self)
        values["sources"]["known_to_uv"] = sorted(self.sources.known_to_uv)
        values["sources"]["constraints"] = [_with_content(path) for path in self.sources.constraints]
        return json.loads(json.dumps(values))  # type: ignore[no-any-return]


def _with_content(path: str) -> str:
    try:
        return f"{path} {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]}"
    except OSError:  # an address, or not there: the installer says so
        return path


def make_recipe(wanted: Wanted) -> Recipe:
    """Fill in what was left open.

    Raises:
        BadInputError: a version is malformed, or the running environment does not say what it is.
        UnsupportedError: numerics-suite does not support such a version.
    """
    if wanted.transformers_source is not None and not wanted.transformers_commit:
        message = f"{wanted.transformers_source}: no commit given"
        raise BadInputError(message)
    transformers = (
        f"git-{wanted.transformers_commit}"
        if wanted.transformers_source is not None
        else _release("transformers", wanted.transformers)
    )
    own = own_requirements()
    torch = _release("torch", wanted.torch)
    for name, version in (("torch", torch), ("transformers", transformers)):
        for requirement in own:
            if requirement.name == name and not version.startswith("git-"):
                _refuse_unsupported(requirement, version)
    others = (requirement for requirement in own if canonicalize_name(requirement.name) not in UNDER_TEST)
    return Recipe(
        python=_python(wanted.python),
        torch=torch,
        transformers=transformers,
        requirements=(
            *map(str, others),
            *_optional(wanted),
            *(f"{name}=={version}" for name, version in wanted.others),
        ),
        sources=package_sources(),
        platform="-".join((platform.system(), platform.machine(), *platform.libc_ver())).rstrip("-"),
        others=wanted.others,
    )


def _optional(wanted: Wanted) -> Iterator[str]:
    """What the running environment has, of releases that were not chosen."""
    chosen = {name for name, _ in wanted.others}
    return (name for name in OPTIONAL if name not in chosen and _is_installed(name))


def _refuse_unsupported(requirement: Requirement, version: str) -> None:
    if not requirement.specifier.contains(version, prereleases=True):
        message = f"numerics-suite needs {requirement.name}{requirement.specifier}, and {version} is older"
        raise UnsupportedError(message)


def _release(package: str, wanted: str | None) -> str:
    """The public version: `2.13.0` of `2.13.0+cpu`, for another index may have another build only."""
    if wanted is None:
        try:
            return Version(importlib.metadata.version(package)).public
        except importlib.metadata.PackageNotFoundError:
            message = f"{package} is not installed here; say which version of it is wanted"
            raise BadInputError(message) from None
    try:
        return str(Version(wanted))
    except InvalidVersion:
        message = f"'{wanted}' is not a version of {package}"
        raise BadInputError(message) from None


def _python(wanted: str | None) -> str:
    running = platform.python_version()
    if wanted is None or running == wanted or running.startswith(f"{wanted}."):
        return running
    if not re.fullmatch(r"\d+(\.\d+){0,2}\S*", wanted) and os.path.sep not in wanted:
        message = f"'{wanted}' is not a Python: a version such as 3.12, or an interpreter's path"
        raise BadInputError(message)
    return wanted


def base_interpreter() -> str:
    """The interpreter that the running environment was made from."""
    return str(getattr(sys, "_base_executable", None) or sys.executable)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def own_requirements() -> list[Requirement]:
    """What numerics-suite itself needs inside an environment: no extras, and not what makes environments.

    Raises:
        BadInputError: this copy has neither metadata nor a pyproject.toml.
    """
    return [
        requirement
        for requirement in map(Requirement, _own_lines())
        if "extra" not in str(requirement.marker) and requirement.name not in MAKERS
    ]


def _own_lines() -> Iterator[str]:
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        lines = _lines_of_checkout()
    yield from lines


def _lines_of_checkout() -> list[str]:
    """A checkout on PYTHONPATH has no metadata."""
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    project = read_toml(path).get("project", {}) if path.is_file() else {}
    if project.get("name") != DISTRIBUTION:
        message = "this copy of numerics-suite does not say what it needs; install it (pip install numerics-suite)"
        raise BadInputError(message)
    return list(project["dependencies"])
