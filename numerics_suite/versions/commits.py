"""git, read only: commits between two refs, and the files of one."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path
from typing import NoReturn

from numerics_suite.core.errors import BadInputError
from numerics_suite.versions.installers import run_quietly


def refuse_equal(good: str, bad: str) -> None:
    """Two ends that are one have nothing between them.

    Raises:
        BadInputError: they are equal.
    """
    if good == bad:
        message = f"--good and --bad are both {good}: give two different ends"
        raise BadInputError(message)


def refuse_swapped(good: str, bad: str) -> NoReturn:
    """Say that the ends stand the wrong way round.

    Raises:
        BadInputError: always.
    """
    message = f"--good {good} is newer than --bad {bad}: swap them (--good {bad} --bad {good})"
    raise BadInputError(message)


def commits_between(repository: Path, good: str, bad: str, path: Path | None = None) -> list[str]:
    """Hashes on the first-parent line from good to bad, the good one first; besides the ends those that touch the path alone.

    Raises:
        BadInputError: no such repository or ref, or the ends are equal, swapped or not on one line.
    """
    first = _commit(repository, "--good", good)
    last = _commit(repository, "--bad", bad)
    refuse_equal(first[:12], last[:12])
    if not _is_ancestor(repository, first, last):
        if _is_ancestor(repository, last, first):
            refuse_swapped(good, bad)
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

    Raises:
        BadInputError: it says no, or there is no git.
    """
    status, output, complaint = _git(repository, *arguments)
    if status != 0:
        message = f"{repository}: {_reason(complaint).removeprefix('fatal: ')}"
        raise BadInputError(message)
    return output.strip()


def export(repository: Path, commit: str, inside: str, target: Path, *, refusal: str) -> None:
    """The files of a commit, and nothing that lies in the working tree; the repository is only read.

    Args:
        repository: its root.
        commit: full hash.
        inside: a folder relative to the root, `.` for all.
        target: folder that is made for them.
        refusal: how the message begins where git says no.

    Raises:
        BadInputError: git says no.
    """
    packed = target.with_suffix(".tar")
    command = ["git", "-C", str(repository), "archive", "--format=tar", f"--output={packed}", commit, "--", inside]
    status, _, complaint = run_quietly(command, dict(os.environ))
    if status != 0:
        message = f"{refusal}: {_reason(complaint)}"
        raise BadInputError(message)
    target.mkdir()
    with tarfile.open(packed) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(target, filter="data")
        else:  # an early patch release of Python 3.10 or 3.11
            archive.extractall(target)  # noqa: S202 - git's own archive
    packed.unlink()


def _reason(complaint: str) -> str:
    return (complaint.strip().splitlines() or ["git gives no reason"])[-1]


def _git(repository: Path, *arguments: str) -> tuple[int, str, str]:
    if not repository.is_dir():
        message = f"{repository}: no such directory"
        raise BadInputError(message)
    try:
        return run_quietly(["git", "-C", str(repository), *arguments], dict(os.environ))
    except FileNotFoundError:
        message = "git is not on PATH, and a repository was named"
        raise BadInputError(message) from None
