"""`numerics-suite watch SCRIPT [ARGS…]`: a training script, unchanged, under the watch."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.cli.output import VERDICTS, only_json_on_stdout, refuse_unwritable, write_json
from numerics_suite.cli.parser import CommandParser, add_output_options
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.text import harmless

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from numerics_suite.core.records import Finding
    from numerics_suite.training_watch.script import Finder

EXAMPLES = """\
  numerics-suite watch train.py --epochs 3
      stops at the first bad value and writes .numerics/bundle
  numerics-suite watch --on-bad warn --snapshot-every 100 train.py
      goes on, with a copy of the parameters each 100 steps to replay from
  torchrun --no-python --nproc-per-node 2 numerics-suite watch train.py
  numerics-suite check --bundle .numerics/bundle

exit status:
  the script's own; 1 where a bad value was found, 4 bad usage
"""


def make_parser() -> CommandParser:
    """The parser of `watch`, without the script and what is the script's own."""
    parser = CommandParser(
        "watch",
        usage="[OPTIONS] SCRIPT [ARGS ...]",
        description="Runs a training script, unchanged, under the watch. Options come before SCRIPT.",
        examples=EXAMPLES,
    )
    parser.add_argument("--on-bad", metavar="WHAT", default="stop", help="stop, warn, or skip the step (default: stop)")
    parser.add_argument(
        "--bundle", metavar="DIR", default=".numerics/bundle", help="what to write then (default: .numerics/bundle)"
    )
    counts = {
        "every": (1, "look each N-th step"),
        "every-parameters": (20, "look at the parameters each N-th step"),
        "snapshot-every": (0, "copy the parameters each N steps to replay from; 0: never"),
        "ring": (4, "steps whose batches are kept"),
    }
    for name, (default, text) in counts.items():
        parser.add_argument(f"--{name}", metavar="N", type=int, default=default, help=f"{text} (default: {default})")
    add_output_options(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run `watch` and return its exit status.

    Raises:
        BadInputError: no script, or an option means nothing.
    """
    parser = make_parser()
    own, script = _split(list(arguments), parser)
    given = parser.parse(own)
    if not script:
        message = "no SCRIPT given; see numerics-suite watch --help"
        raise BadInputError(message)
    if given.on_bad not in {"stop", "warn", "skip"}:
        message = f"--on-bad: must be stop, warn or skip, not '{given.on_bad}'"
        raise BadInputError(message)
    path = Path(script[0])
    if not path.exists():
        message = f"no script {path}"
        raise BadInputError(message)
    refuse_unwritable(given.json)
    return _watched(path, script[1:], given)


def _split(arguments: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """The tool's options, and the script with what is its own."""
    place = 0
    while place < len(arguments):
        word = arguments[place]
        if word == "--":
            return arguments[:place], arguments[place + 1 :]
        if not word.startswith("-"):
            break
        action = parser._option_string_actions.get(word)  # noqa: SLF001 - argparse has no public way to ask
        place += 2 if action is not None and action.nargs is None and "=" not in word else 1
    return arguments[:place], arguments[place:]


def _watched(path: Path, arguments: list[str], given: argparse.Namespace) -> int:
    from numerics_suite.training_watch.alarms import NumericsError
    from numerics_suite.training_watch.script import Finder, run_script
    from numerics_suite.training_watch.watch_settings import WatchSettings

    try:
        settings = WatchSettings(
            every=given.every,
            every_parameters=given.every_parameters,
            snapshot_every=given.snapshot_every,
            ring=given.ring,
        )
    except ValueError as error:
        raise BadInputError(str(error).removeprefix("watch: ")) from None
    finder = Finder(settings, on_bad=given.on_bad, bundle=Path(given.bundle))
    status, stopped, process = 0, False, os.getpid()
    try:
        with only_json_on_stdout() if given.json == "-" else contextlib.nullcontext():
            status = run_script(path, arguments, finder)
    except NumericsError:
        stopped = True
    except Exception as error:  # noqa: BLE001 - the script's own; it is shown as python would
        traceback.print_exception(type(error), error, _of_script(error, path))
        status = 1
    if (
        os.getpid() != process
    ):  # a child that the script forked: it tells nothing, and ends with the status that it chose
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return _ended(finder, given, status, stopped=stopped)


def _of_script(error: BaseException, path: Path) -> Any:
    """The traceback from the script on."""
    trace = error.__traceback__
    while trace is not None and Path(trace.tb_frame.f_code.co_filename) != path:
        trace = trace.tb_next
    return trace or error.__traceback__


def _ended(finder: Finder, given: argparse.Namespace, status: int, *, stopped: bool) -> int:
    """Tell what was found; a finding makes an exit status of 0 a 1."""
    caught = [watch for watch in finder.watches if watch.finding is not None]
    sys.stdout.flush()
    for watch in caught:
        assert watch.finding is not None
        sys.stderr.write(f"numerics-suite: step {watch.finding.step}: {harmless(watch.finding.title)}\n")
        if watch.bundle_path is not None and not given.quiet:
            sys.stderr.write(f"numerics-suite: numerics-suite check --bundle {watch.bundle_path}\n")
    notes = finder.notes(stopped=stopped)
    for note in [] if given.quiet else notes:
        sys.stderr.write(f"numerics-suite: {note}\n")
    ended = 1 if stopped or (caught and not status) else status
    if given.json:
        document = {**_as_json(finder, [watch.finding for watch in caught if watch.finding], status), "notes": notes}
        write_json(
            given.json, {**document, "verdict": "fail" if caught else VERDICTS.get(status and 3, "error")}, status
        )
    return ended


def _as_json(finder: Finder, findings: list[Finding], status: int) -> dict[str, Any]:
    from numerics_suite.core.findings import finding_to_json
    from numerics_suite.core.numbers import jsonable

    return {
        "schema_version": 1,
        "command": "watch",
        "script_status": status,
        "steps": max((watch.step for watch in finder.watches), default=0),
        "findings": [finding_to_json(finding) for finding in findings],
        "bundles": [str(watch.bundle_path) for watch in finder.watches if watch.bundle_path is not None],
        "warnings": [
            {"step": alarm.step, "kind": alarm.kind, "text": alarm.text, "facts": jsonable(alarm.facts)}
            for watch in finder.watches
            for alarm in watch.warnings
        ],
    }
