"""`numerics-suite check`: subject × precision × attention × device, loaded, fuzzed, trained and judged."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.cli.output import deliver, for_people, unfinished_answer, write_json
from numerics_suite.cli.parser import CommandParser
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.garbage import none_collected
from numerics_suite.settings.options import add_cli_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numerics_suite.core.records import RunResult
    from numerics_suite.reports.terminal import Terminal
    from numerics_suite.settings.tree import Settings
    from numerics_suite.suite.session import SuiteSession

BAD_INPUT = 4
TRIED = ".numerics/tried"
"""Where answers of other releases are kept."""

EXAMPLES = """\
  numerics-suite check
      the shipped GLM-4 fixtures, in every precision that this device runs well
  numerics-suite check ./my-checkpoint --task sequence-classification
      your own checkpoint, about to get a classification head
  numerics-suite check fixture:glm4-tiny --precision bf16,fp16 --json out.json
      two precisions, with a results file
  numerics-suite check ./my-checkpoint --task sequence-classification \\
      --data my.jsonl --steps 20 --lr 5e-5
      rehearse training on your own texts: curves, the largest stable
      learning rate, and the settings that they recommend
  numerics-suite check zai-org/GLM-4-9B-0414@main --checks 'load.*' --list
      what would be run, and the memory that it may need

exit status:
  0 passed, 1 findings, 2 interrupted, 3 internal error, 4 bad input,
  5 no check ran, or --max-time left some out
"""


def make_parser() -> CommandParser:
    """The parser of `check`."""
    parser = CommandParser(
        "check",
        usage="[SUBJECT ...] [OPTIONS]",
        description="Runs the suite over subject × precision × attention × device.",
        examples=EXAMPLES,
    )
    add_cli_options(parser)
    parser.add_argument("--bundle", metavar="DIR", help="reopen what `watch` caught; with SUBJECT, run it there")
    parser.add_argument(
        "--try-versions",
        action="store_true",
        help="try newer-version and pin-version on findings, in environments of other transformers releases",
    )
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="of each finding also evidence, batch, curves and where the limit comes from",
    )
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run `check` and return its exit status.

    Raises:
        BadInputError: the input cannot be used.
    """
    settings, own = make_parser().parse_settings(arguments)
    if own["bundle"] is not None:
        return _reopen(settings, Path(own["bundle"]), verbose=own["verbose"])
    if settings.list_only:
        return _list(settings)
    return _check(settings, other_versions=own["try_versions"], verbose=own["verbose"])


def _list(settings: Settings) -> int:
    from numerics_suite.reports.plan import plan_to_json
    from numerics_suite.reports.terminal import Terminal
    from numerics_suite.suite.run import planned

    with for_people(settings) as stream:
        rows, seconds = planned(settings)
        Terminal(stream=stream, quiet=False).plan(rows, seconds)
    if settings.json:
        write_json(settings.json, plan_to_json(rows), 0)
    return 0


def _check(settings: Settings, *, other_versions: bool, verbose: bool) -> int:
    with none_collected():
        from numerics_suite.reports.documents import CheckRun, Documents
        from numerics_suite.reports.results import to_json
        from numerics_suite.reports.terminal import Terminal
        from numerics_suite.suite.run import run_check
        from numerics_suite.suite.session import SuiteSession

    session = SuiteSession(settings)
    with for_people(settings) as stream:
        terminal = Terminal(stream=stream, quiet=settings.quiet, verbose=verbose)
        try:
            with unfinished_answer(settings.json, "check", **_so_far(settings)):
                result = run_check(session, terminal, asks_index=other_versions)
        finally:
            terminal.stop()
        try:
            if other_versions and result.complete:
                result = _with_other_versions(result, settings, terminal)
            if settings.data is not None and result.complete:
                result = _rehearsed(result, session, terminal)
        except KeyboardInterrupt:
            note = "interrupted after the checks, while remedies or rehearsals were tried"
            result = replace(result, complete=False, verdict="error", exit_status=2, notes=(*result.notes, note))
        terminal.rehearsals(result.rehearsals)
        unwritten = None
        if settings.json and settings.json != "-":
            try:
                write_json(settings.json, to_json(result))  # first: whoever stops the run may not wait for the rest
            except BadInputError as error:  # a disk that is full now: what was found is still told
                unwritten = error
        refused = tuple(dict.fromkeys(str(check.reason) for check in result.checks if check.bad_input))
        if not refused or any(check.status in {"passed", "failed", "accepted"} for check in result.checks):
            terminal.summary(result)
        if unwritten is not None:
            raise unwritten
    if settings.json == "-":
        write_json(settings.json, to_json(result))
    documents = Documents(runs=(CheckRun(label="check", result=result),))
    deliver(documents, settings.report, settings.junitxml, silent=settings.quiet or settings.json == "-")
    if result.exit_status == BAD_INPUT:
        raise BadInputError("; ".join(refused))
    return result.exit_status


def _so_far(settings: Settings) -> dict[str, Any]:
    """What the results file holds until the plan is made: the very answers that are resumed, where it is the same file."""
    if settings.resume is None:
        return {"checks": []}
    from numerics_suite.reports.documents import read_check

    content, _ = read_check(settings.resume, "--resume")
    if not settings.json or os.path.realpath(settings.json) != os.path.realpath(settings.resume):
        return {"checks": []}
    about = {name: value for name, value in content.items() if name != "command"}
    return {**about, "complete": False, "verdict": "error", "exit_status": 3}


def _with_other_versions(result: RunResult, settings: Settings, terminal: Terminal) -> RunResult:
    """The result with the remedies that are another release tried."""
    from numerics_suite.versions.jobs import Jobs
    from numerics_suite.versions.matrix import in_environments
    from numerics_suite.versions.release_remedies import try_versions
    from numerics_suite.versions.result_store import ResultStore

    processes = Jobs()
    with ResultStore(Path(TRIED), "--try-versions") as kept:
        try:
            return try_versions(result, settings, kept, in_environments(processes), terminal.say)
        finally:
            processes.stop()


def _rehearsed(result: RunResult, session: SuiteSession, terminal: Terminal) -> RunResult:
    """The result with training on the user's own texts, where checks of training were asked for."""
    from numerics_suite.suite.rehearsal import rehearse

    if not any(question.group == "train" for question in session.plan.questions):
        return result
    return replace(result, rehearsals=rehearse(session, terminal.say))


def _reopen(settings: Settings, bundle: Path, *, verbose: bool) -> int:
    from numerics_suite.reports.results import to_json
    from numerics_suite.reports.terminal import Terminal
    from numerics_suite.suite.bundle_replay import refuse_other_options, reopen

    refuse_other_options(settings)
    with for_people(settings) as stream:
        result = reopen(settings, bundle)
        Terminal(stream=stream, quiet=settings.quiet, verbose=verbose).summary(result)
    if settings.json:
        write_json(settings.json, to_json(result))
    return result.exit_status
