"""What is in the cache, how large is it, and what goes when it is too large?

Sizes are of the disk: files that several environments share by hard links count once. The copies that uv keeps in a cache of
its own are the same files again, and `uv cache clean` is for those.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from numerics_suite.core.errors import BadInputError
from numerics_suite.subjects.fixtures import cache_dir
from numerics_suite.versions import locks
from numerics_suite.versions.markers import MARKER, environments_folder, locks_folder, read_marker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

LIMIT_VARIABLE = "NUMERICS_SUITE_CACHE_LIMIT"
DEFAULT_LIMIT = "20 GB"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

RELAXED = 20
"""Looking at every file takes a second for a dozen environments; so at most a twentieth of the time is spent on it."""

Files = dict[tuple[int, int], int]
"""Bytes on the disk by device and inode."""

_look_again_at = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredItem:
    """Something kept between runs.

    Attributes:
        name: of its folder.
        kind: `environment`, `fixture` or `running-copy`.
        path: its folder.
        finished: whether it can be used.
        title: what is in it, for a person.
        bytes: on the disk.
        own_bytes: of these, what no other entry shares.
        used_at: seconds since 1970, when it was used last.
        files: of it.
    """

    name: str
    kind: str
    path: Path
    finished: bool
    title: str
    bytes: int
    own_bytes: int
    used_at: float
    files: Files = field(repr=False, compare=False)


def parse_size(text: str) -> int:
    """Bytes of `20 GB`, `500M`, `1.5TB` or a plain number.

    Raises:
        BadInputError: it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?\s*", text, re.IGNORECASE)
    if not found:
        message = f"'{text}' is no size: give one such as 20 GB or 500 MB"
        raise BadInputError(message)
    return int(float(found[1]) * _UNITS[found[2].upper()])


def size_limit() -> int:
    """Bytes that all environments together may take: `NUMERICS_SUITE_CACHE_LIMIT`, else 20 GB.

    Raises:
        BadInputError: the variable is no size.
    """
    text = os.environ.get(LIMIT_VARIABLE) or DEFAULT_LIMIT
    try:
        return parse_size(text)
    except BadInputError as error:
        message = f"{LIMIT_VARIABLE}: {error}"
        raise BadInputError(message) from None


def entries() -> list[StoredItem]:
    """Everything in the cache, used last first."""
    folders = list(_folders())
    files = {folder: _files(folder) for _, folder in folders}
    owners = Counter(key for found in files.values() for key in found)
    listed = [_entry(kind, folder, files[folder], owners) for kind, folder in folders]
    return sorted(listed, key=lambda entry: (-entry.used_at, entry.name))


def disk_use(listed: Sequence[StoredItem]) -> int:
    """Bytes that the entries take together, shared files counted once."""
    files: Files = {}
    for entry in listed:
        files.update(entry.files)
    return sum(files.values())


def _folders() -> Iterator[tuple[str, Path]]:
    places = (("environment", environments_folder()), ("fixture", cache_dir() / "fixtures"))
    for kind, place in places:
        if place.is_dir():
            yield from (
                (kind, folder) for folder in sorted(place.iterdir()) if folder.is_dir() and not folder.is_symlink()
            )


def _entry(kind: str, folder: Path, files: Files, owners: Counter[tuple[int, int]]) -> StoredItem:
    marker = read_marker(folder) if kind == "environment" else None
    witness = folder / (MARKER if kind == "environment" else "config.json")
    finished = marker is not None if kind == "environment" else witness.is_file() and not folder.name.startswith(".")
    if marker is not None:
        names = ("transformers", "torch", "python")
        title = ", ".join(f"{name} {marker['versions'][name]}" for name in names)
    else:
        title = folder.name.removeprefix(".") if finished else "unfinished"
    return StoredItem(
        name=folder.name,
        kind=kind,
        path=folder,
        finished=finished,
        title=title,
        bytes=sum(files.values()),
        own_bytes=sum(size for key, size in files.items() if owners[key] == 1),
        used_at=_time_of(witness if finished else folder),
        files=files,
    )


def _time_of(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it went meanwhile
        return time.time()


def _files(folder: Path) -> Files:
    """Every file below; links are not followed, and what vanishes meanwhile does not count."""
    found: Files = {}
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as items:
                for item in items:
                    if item.is_dir(follow_symlinks=False):
                        waiting.append(item.path)
                        continue
                    facts = item.stat(follow_symlinks=False)
                    found[facts.st_dev, facts.st_ino or hash(item.path)] = (
                        getattr(facts, "st_blocks", 0) * 512 or facts.st_size
                    )
        except OSError:
            continue
    return found


def remove(entry: StoredItem) -> bool:
    """Remove one entry, unless a process uses or makes it.

    Returns:
        Whether it is gone.

    Raises:
        BadInputError: it does not lie in the cache, or cannot be removed.
    """
    root = cache_dir().resolve()
    if entry.path.is_symlink() or entry.path.resolve().parent.parent != root:
        message = f"{entry.path} does not lie in the cache {root}"
        raise BadInputError(message)
    if entry.kind != "environment":
        _remove_tree(entry.path)
        return True
    with locks.alone_if_free(locks_folder(), entry.name) as free:
        if not free or locks.is_used(locks_folder(), entry.name):
            return False
        (entry.path / MARKER).unlink(missing_ok=True)  # first: from here on it is unfinished, whatever happens
        _remove_tree(entry.path)
    return True


def _remove_tree(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        message = f"cannot remove {folder}: {error.strerror or error}"
        raise BadInputError(message) from None


def make_room(say: Callable[[str], None]) -> None:
    """Remove the environments used longest ago until the limit is kept; those in use stay."""
    global _look_again_at  # noqa: PLW0603 - one pace for the process
    limit, started = size_limit(), time.monotonic()
    if started < _look_again_at:
        return
    environments = [entry for entry in entries() if entry.kind == "environment"]
    while environments and disk_use(environments) > limit:
        removed = next((entry for entry in reversed(environments) if remove(entry)), None)
        if removed is None:
            break
        environments.remove(removed)
        say(f"removed {removed.name} from the cache, over its limit of {limit / 1e9:g} GB")
    ended = time.monotonic()
    _look_again_at = ended + RELAXED * (ended - started)
