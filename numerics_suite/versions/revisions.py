"""Revisions of a checkpoint as candidates: snapshots of the hub's cache, or commits of the repository it lies in."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from numerics_suite.core.errors import BadInputError, nearest
from numerics_suite.subjects.fixtures import cache_dir
from numerics_suite.subjects.hub import parse_hub_id
from numerics_suite.versions import locks
from numerics_suite.versions.candidates import Candidate, Exported
from numerics_suite.versions.commits import commits_between, export, git, refuse_equal, refuse_swapped
from numerics_suite.versions.markers import locks_folder


def of_checkpoint(source: str, good: str, bad: str) -> tuple[list[Candidate], str]:
    """The revisions of a checkpoint from good to bad, and a line on how they are ordered.

    Args:
        source: a directory inside a git repository, or a hub id without revision.
        good: a revision.
        bad: a later one.

    Raises:
        BadInputError: it has no revisions, an end is none of them, or they are equal or swapped.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _of_folder(path.resolve(), good, bad), ""
    hub_id = parse_hub_id(source)
    if hub_id is None:
        message = f"{source}: only a hub id or a directory in a git repository has revisions"
        raise BadInputError(message)
    if hub_id.revision is not None:
        message = f"{source}: give the id without a revision; --good and --bad are the revisions"
        raise BadInputError(message)
    return _of_hub(hub_id.id, good, bad)


def _of_folder(path: Path, good: str, bad: str) -> list[Candidate]:
    root = Path(git(path, "rev-parse", "--show-toplevel")).resolve()
    folder = path.relative_to(root)
    return [
        Candidate(
            label=commit[:12],
            subject=str(_place(root, commit, folder)),
            exported=Exported(repository=root, commit=commit, folder=folder),
        )
        for commit in commits_between(root, good, bad, path)
    ]


def _place(root: Path, commit: str, folder: Path) -> Path:
    """Where a folder of a commit is brought; the same at every run, so that answers are found again."""
    return (
        cache_dir() / "revisions" / root.name / commit / folder
        if folder.parts
        else cache_dir() / "revisions" / commit / root.name
    )


@contextlib.contextmanager
def brought(candidate: Candidate) -> Iterator[None]:
    """The candidate's files are there while this lasts, also where another process ends its use; the repository is only read.

    Raises:
        BadInputError: they cannot be had.
    """
    exported = candidate.exported
    if exported is None or candidate.subject is None:
        yield
        return
    target = Path(candidate.subject)
    name = f"revision-{hashlib.sha256(str(target).encode()).hexdigest()[:16]}"
    with locks.alone(locks_folder(), name):
        if not locks.is_used(locks_folder(), name):  # what lies there was left by a process that was killed
            shutil.rmtree(target, ignore_errors=True)
            _bring(exported, target)
        use = locks.Use(locks_folder(), name)
    try:
        yield
    finally:
        with locks.alone(locks_folder(), name):
            use.end()
            if not locks.is_used(locks_folder(), name):
                shutil.rmtree(target, ignore_errors=True)


def _bring(exported: Exported, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".bring-", dir=target.parent) as scratch:
        inside, files = exported.folder.as_posix(), Path(scratch) / "files"
        refusal = f"commit {exported.commit[:12]} has no {inside}"
        export(exported.repository, exported.commit, inside, files, refusal=refusal)
        (files / exported.folder).rename(target)


def _of_hub(hub_id: str, good: str, bad: str) -> tuple[list[Candidate], str]:
    snapshots = _snapshots(hub_id)
    order, note = _order(hub_id, list(snapshots))
    ends = [_commit(hub_id, end, text, order) for end, text in (("--good", good), ("--bad", bad))]
    refuse_equal(*(commit[:12] for commit in ends))
    first, last = (order.index(commit) for commit in ends)
    if first > last:
        refuse_swapped(good, bad)
    return [Candidate(label=commit[:12], subject=f"{hub_id}@{commit}") for commit in order[first : last + 1]], note


def _cache(hub_id: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"


def _snapshots(hub_id: str) -> dict[str, float]:
    """Commits in the hub's cache, with the time at which each was fetched."""
    folder = _cache(hub_id) / "snapshots"
    found = {one.name: one.stat().st_mtime for one in folder.iterdir() if one.is_dir()} if folder.is_dir() else {}
    if not found:
        message = f"{hub_id}: the hub's cache {folder.parent} holds no revision of it"
        raise BadInputError(message)
    return found


def _order(hub_id: str, commits: list[str]) -> tuple[list[str], str]:
    """Commits, oldest first: as the hub lists them, else as they were fetched."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        try:
            from huggingface_hub import list_repo_commits

            listed = [commit.commit_id for commit in reversed(list_repo_commits(hub_id))]
        except Exception:  # noqa: BLE001 - no network, no permission, or gone: the cache serves
            listed = []
        if set(commits) <= set(listed):
            return [commit for commit in listed if commit in set(commits)], ""
    snapshots = _snapshots(hub_id)
    note = "revisions are in the order in which they were fetched, for the hub cannot be asked"
    return sorted(commits, key=lambda commit: (snapshots[commit], commit)), note


def _commit(hub_id: str, end: str, text: str, commits: list[str]) -> str:
    """The commit that a branch, a tag or the begin of a hash means."""
    ref = _cache(hub_id) / "refs" / text
    name = ref.read_text(encoding="utf-8").strip() if ref.is_file() else text
    found = [commit for commit in commits if commit.startswith(name)]
    if len(found) == 1:
        return found[0]
    known = [commit[:12] for commit in commits]
    why = "is the begin of several" if found else "is not in the hub's cache"
    hint = nearest(text, known) or f" (it has {', '.join(known)})"
    message = f"{end}: revision '{text}' of {hub_id} {why}{hint}"
    raise BadInputError(message)
