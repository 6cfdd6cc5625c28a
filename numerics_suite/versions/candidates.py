"""What lies between the good end and the bad: releases of a package, or commits of a clone; ends are judged first."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from packaging.version import InvalidVersion, Version

from numerics_suite.core.errors import BadInputError
from numerics_suite.versions.index import released
from numerics_suite.versions.installers import run_quietly
from numerics_suite.versions.recipes import Wanted
from numerics_suite.versions.specs import missing

PACKAGES = ("transformers", "torch")


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

    Args:
        package: `transformers` or `torch`.
        good: a version.
        bad: a newer one.
        fixed: the rest of each environment.
        pre: with pre-releases.

    Raises:
        BadInputError: an end does not exist, or they are equal or swapped.
    """
    first, last = (_version(end, text) for end, text in (("--good", good), ("--bad", bad)))
    if first == last:
        refuse_equal(good, good)
    if first > last:
        message = f"--good {good} is newer than --bad {bad}: swap them (--good {bad} --bad {good})"
        raise BadInputError(message)
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


def refuse_equal(good: str, bad: str) -> None:
    """Two ends that are one have nothing between them.

    Raises:
        BadInputError: they are equal.
    """
    if good == bad:
        message = f"--good and --bad are both {good}: give two different ends"
        raise BadInputError(message)


def _with(fixed: Wanted, package: str, version: str) -> Wanted:
    from dataclasses import replace

    return replace(fixed, transformers=version) if package == "transformers" else replace(fixed, torch=version)


# --- commits -----------------------------------------------------------------------------------------------------------


def of_clone(repository: Path, good: str, bad: str, fixed: Wanted) -> list[Candidate]:
    """Every commit of a clone of transformers on the first-parent line from good to bad; the clone is only read.

    Args:
        repository: its root, or a folder in it.
        good: a ref.
        bad: a descendant of it.
        fixed: the rest of each environment.

    Raises:
        BadInputError: no such repository or ref, or the ends are equal, swapped or not on one line.
    """
    from dataclasses import replace

    commits = commits_between(repository, good, bad)
    root = Path(git(repository, "rev-parse", "--show-toplevel"))
    if not (root / "src" / "transformers").is_dir():
        message = f"--git {repository}: no clone of transformers (it has no src/transformers)"
        raise BadInputError(message)
    return [
        Candidate(label=commit[:12], wanted=replace(fixed, transformers_source=root, transformers_commit=commit))
        for commit in commits
    ]


def commits_between(repository: Path, good: str, bad: str, path: Path | None = None) -> list[str]:
    """Hashes on the first-parent line from good to bad, the good one first.

    Args:
        repository: of git.
        good: a ref.
        bad: a ref.
        path: only commits that touch this, besides the ends.

    Raises:
        BadInputError: no such repository or ref, or the ends are equal, swapped or not on one line.
    """
    first = _commit(repository, "--good", good)
    last = _commit(repository, "--bad", bad)
    refuse_equal(first[:12], last[:12])
    if not _is_ancestor(repository, first, last):
        if _is_ancestor(repository, last, first):
            message = f"--good {good} is newer than --bad {bad}: swap them (--good {bad} --bad {good})"
        else:
            message = f"--good {good} is no ancestor of --bad {bad}; give a good commit that the bad one comes from"
        raise BadInputError(message)
    limit = ["--", str(path)] if path is not None else []
    listed = git(repository, "rev-list", "--first-parent", "--reverse", f"{first}..{last}", *limit).split()
    return [first, *(commit for commit in listed if commit != last), last]


def _commit(repository: Path, end: str, ref: str) -> str:
    status, output, _ = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    if status != 0:
        git(repository, "rev-parse", "--git-dir")  # no repository is another mistake
        message = f"{end}: {repository} has no commit '{ref}'"
        raise BadInputError(message)
    return output.strip()


def _is_ancestor(repository: Path, one: str, other: str) -> bool:
    return _git(repository, "merge-base", "--is-ancestor", one, other)[0] == 0


def git(repository: Path, *arguments: str) -> str:
    """What a command of git says.

    Args:
        repository: that it runs in.
        arguments: of git.

    Raises:
        BadInputError: it says no, or there is no git.
    """
    status, output, complaint = _git(repository, *arguments)
    if status != 0:
        lines = complaint.strip().splitlines() or ["git gives no reason"]
        message = f"{repository}: {lines[-1].removeprefix('fatal: ')}"
        raise BadInputError(message)
    return output.strip()


def _git(repository: Path, *arguments: str) -> tuple[int, str, str]:
    if not repository.is_dir():
        message = f"{repository}: no such directory"
        raise BadInputError(message)
    try:
        return run_quietly(["git", "-C", str(repository), *arguments], dict(os.environ))
    except FileNotFoundError:
        message = "git is not on PATH, and a repository was named"
        raise BadInputError(message) from None
