"""`numerics-suite cache list|clean`: the environments and built fixtures kept between runs."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from numerics_suite.cli.output import refuse_unwritable, say, write_json
from numerics_suite.cli.parser import CommandParser, add_output_options
from numerics_suite.core.errors import BadInputError, nearest

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from numerics_suite.versions.retention import StoredItem

EXAMPLES = """\
  numerics-suite cache list
  numerics-suite cache clean --unused 30 --yes
      what was not used for 30 days
  numerics-suite cache clean 'py3.11*-tf4.46.3-*'
      one environment; asks first
  numerics-suite cache clean --limit '5 GB' --yes
      the environments used longest ago, until the rest fits

The folder is NUMERICS_SUITE_CACHE, else numerics-suite in the user's cache
folder. Environments keep within NUMERICS_SUITE_CACHE_LIMIT (20 GB) by
themselves. What a process uses is never removed.
"""
ACTIONS = ("list", "clean")
DAY = 24 * 3600


def make_parser() -> CommandParser:
    """The parser of `cache`."""
    parser = CommandParser(
        "cache",
        usage="list|clean [NAME ...] [OPTIONS]",
        description="Lists or removes the environments and built fixtures kept between runs.",
        examples=EXAMPLES,
    )
    parser.add_argument("action", metavar="list|clean", nargs="?", help="what to do")
    parser.add_argument("names", metavar="NAME", nargs="*", help="entries to remove, as 'list' names them, or globs")
    parser.add_argument("--all", action="store_true", help="clean: everything")
    parser.add_argument("--unused", metavar="DAYS", help="clean: what was not used for so many days")
    parser.add_argument("--limit", metavar="SIZE", help="clean: environments until the rest fits")
    parser.add_argument("--yes", action="store_true", help="clean: do not ask")
    add_output_options(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run `cache` and return its exit status.

    Raises:
        BadInputError: no such action or entry, or it cannot be removed.
    """
    given = make_parser().parse_action(arguments, ACTIONS)
    _refuse_nonsense(given)
    refuse_unwritable(given.json)
    answer = {"list": _list, "clean": _clean}[given.action](given)
    if given.json:
        write_json(given.json, {"schema_version": 1, "command": "cache", "action": given.action, **answer}, 0)
    return 0


def _refuse_nonsense(given: argparse.Namespace) -> None:
    chosen = [name for name in ("all", "unused", "limit") if getattr(given, name)]
    if given.action == "list" and (given.names or chosen):
        message = f"list takes no {'names' if given.names else f'--{chosen[0]}'}; it lists everything"
        raise BadInputError(message)
    if given.action == "clean" and len(chosen) + bool(given.names) != 1:
        message = "clean: name entries, or give one of --all, --unused DAYS, --limit SIZE; numerics-suite cache list names them"
        raise BadInputError(message)


def _list(given: argparse.Namespace) -> dict[str, Any]:
    from numerics_suite.subjects.fixtures import cache_dir
    from numerics_suite.versions.retention import disk_use, entries, size_limit

    found, limit = entries(), size_limit()
    total = disk_use(found)
    if given.json != "-":
        width = max([len(entry.name) for entry in found], default=0) + 2
        if found:
            say(f"{'name':<{width}}{'size':>9}{'own':>9}  {'last used':<16}what")
        for entry in found:
            sizes = f"{_size(entry.bytes):>9}{_size(entry.own_bytes):>9}"
            say(f"{entry.name:<{width}}{sizes}  {_ago(entry.used_at):<16}{entry.kind}: {entry.title}")
        if not given.quiet:
            say(f"{len(found)} entries, {_size(total)} (shared files once) in {cache_dir()}; limit {_size(limit)}")
    return {"folder": str(cache_dir()), "bytes": total, "limit_bytes": limit, "entries": [_row(one) for one in found]}


def _clean(given: argparse.Namespace) -> dict[str, Any]:
    from numerics_suite.versions.retention import entries, remove

    chosen = _chosen(given, entries())
    if chosen and not given.yes:
        _ask(chosen)
    removed: list[StoredItem] = []
    kept: list[StoredItem] = []
    for entry in chosen:
        gone = remove(entry)
        (removed if gone else kept).append(entry)
        if given.json != "-" and not (given.quiet and gone):
            say(f"removed {entry.name}" if gone else f"kept {entry.name}: a process uses it")
    if given.json != "-" and not given.quiet:
        say(f"{len(removed)} removed, {_size(sum(entry.own_bytes for entry in removed))} of their own")
    return {"removed": [_row(entry) for entry in removed], "kept": [_row(entry) for entry in kept]}


def _chosen(given: argparse.Namespace, found: Sequence[StoredItem]) -> list[StoredItem]:
    if given.all:
        return list(found)
    if given.unused:
        before = time.time() - _days(given.unused) * DAY
        return [entry for entry in found if entry.used_at < before]
    if given.limit:
        return _over(given.limit, found)
    return _named(given.names, found)


def _named(names: Sequence[str], found: Sequence[StoredItem]) -> list[StoredItem]:
    from fnmatch import fnmatchcase

    chosen: dict[str, StoredItem] = {}
    for name in names:
        matched = [entry for entry in found if fnmatchcase(entry.name, name)]
        if not matched:
            message = f"the cache has no '{name}'{nearest(name, [entry.name for entry in found])}"
            raise BadInputError(message if found else f"{message}; it is empty")
        chosen.update((entry.name, entry) for entry in matched)
    return list(chosen.values())


def _over(limit: str, found: Sequence[StoredItem]) -> list[StoredItem]:
    """Environments, those used longest ago first, without which the rest fits."""
    from numerics_suite.versions.retention import disk_use, parse_size

    most = parse_size(limit)
    kept = [entry for entry in found if entry.kind == "environment"]
    chosen: list[StoredItem] = []
    while kept and disk_use(kept) > most:
        chosen.append(kept.pop())
    return chosen


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = -1
    if not 0 <= days < float("inf"):
        message = f"--unused: '{text}' is no number of days"
        raise BadInputError(message)
    return days


def _ask(chosen: Sequence[StoredItem]) -> None:
    """Ask the person at the terminal.

    Raises:
        BadInputError: there is none, or the answer is no.
    """
    names = ", ".join(entry.name for entry in chosen)
    if not (sys.stdin and sys.stdin.isatty()):
        message = f"clean would remove {names}; add --yes"
        raise BadInputError(message)
    sys.stderr.write(f"remove {names}? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        message = "nothing was removed"
        raise BadInputError(message)


def _row(entry: StoredItem) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.kind,
        "path": str(entry.path),
        "finished": entry.finished,
        "title": entry.title,
        "bytes": entry.bytes,
        "own_bytes": entry.own_bytes,
        "used_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.used_at)),
    }


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _ago(used_at: float) -> str:
    seconds = max(0.0, time.time() - used_at)
    for name, length in (("day", DAY), ("hour", 3600), ("minute", 60)):
        count = int(seconds // length)
        if count:
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"
