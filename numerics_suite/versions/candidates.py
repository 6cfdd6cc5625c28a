"""What lies between the good end and the bad: releases of a package, or commits of a clone; ends are judged first."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from packaging.version import InvalidVersion, Version

from numerics_suite.core.errors import BadInputError
from numerics_suite.versions.commits import commits_between, git, refuse_equal, refuse_swapped
from numerics_suite.versions.index import released
from numerics_suite.versions.recipes import Wanted
from numerics_suite.versions.specs import missing


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A folder as it was at a commit of its repository.

    Attributes:
        repository: its root.
        commit: full hash.
        folder: relative to the root.
    """

    repository: Path
    commit: str
    folder: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One place where the checks can be asked.

    Attributes:
        label: for people and files.
        wanted: the environment; None for the running one.
        subject: SUBJECT there, None for the one that the user typed.
        exported: files that must be brought out of a repository first, to be the subject.
    """

    label: str
    wanted: Wanted | None = None
    subject: str | None = None
    exported: Exported | None = None


def of_package(package: str, good: str, bad: str, fixed: Wanted, *, pre: bool = False) -> list[Candidate]:
    """Every release from good to bad, the good one first.

    Raises:
        BadInputError: an end does not exist, or they are equal or swapped.
    """
    first, last = (_version(end, text) for end, text in (("--good", good), ("--bad", bad)))
    if first == last:
        refuse_equal(good, good)
    if first > last:
        refuse_swapped(good, bad)
    known = released(package, pre=pre or first.is_prerelease or last.is_prerelease, python=fixed.python)
    for end, version in (("--good", first), ("--bad", last)):
        if version not in known:
            message = f"{end}: {missing(package, version, known)}"
            raise BadInputError(message)
    between = [version for version in known if first <= version <= last]
    kept = [version for version in between if not version.is_prerelease or pre or version in {first, last}]
    return [Candidate(label=str(version), wanted=_with(fixed, package, str(version))) for version in kept]


def _version(end: str, text: str) -> Version:
    try:
        return Version(text)
    except InvalidVersion:
        message = f"{end}: '{text}' is not a version"
        raise BadInputError(message) from None


def _with(fixed: Wanted, package: str, version: str) -> Wanted:
    if package == "transformers":
        return replace(fixed, transformers=version)
    return replace(fixed, torch=version) if package == "torch" else replace(fixed, others=((package, version),))


# --- commits -----------------------------------------------------------------------------------------------------------


def of_clone(repository: Path, good: str, bad: str, fixed: Wanted) -> list[Candidate]:
    """Every commit of a clone of transformers on the first-parent line from good to bad; the clone is only read.

    Raises:
        BadInputError: no such repository or ref, or the ends are equal, swapped or not on one line.
    """
    commits = commits_between(repository, good, bad)
    root = Path(git(repository, "rev-parse", "--show-toplevel"))
    if not (root / "src" / "transformers").is_dir():
        message = f"--git {repository}: no clone of transformers (it has no src/transformers)"
        raise BadInputError(message)
    return [
        Candidate(label=commit[:12], wanted=replace(fixed, transformers_source=root, transformers_commit=commit))
        for commit in commits
    ]
