"""`numerics-suite init`: a section of settings, a workflow and a first baseline in the user's repository."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.cli.output import for_people, write_json
from numerics_suite.cli.parser import CommandParser
from numerics_suite.cli.record import DEFAULT_FOLDER, OPTIONS, write_baselines
from numerics_suite.settings.options import add_cli_options

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import IO

    from numerics_suite.adoption.pieces import Piece
    from numerics_suite.adoption.workflows import Host
    from numerics_suite.core.records import Cell
    from numerics_suite.settings.tree import Settings

SHIPPED = ("fixture:glm4-tiny", "fixture:glm4-tiny-classifier")
"""What the gate holds where the user names no checkpoint: the GLM-4 code of whatever transformers is installed."""

EXAMPLES = """\
  numerics-suite init ./my-checkpoint
      settings, a workflow and a first baseline for your own checkpoint
  numerics-suite init ./my-checkpoint --task sequence-classification \\
      --precision bf16,amp-bf16 --ci gitlab
  numerics-suite init
      without a checkpoint of yours: the shipped GLM-4 fixtures, which hold
      the transformers and torch that you install to account
  numerics-suite init --dry-run
      says what it would write, and writes nothing

What is there already stays as it is; a second run writes only what is missing.

exit status:
  0 written, 2 interrupted, 3 a cell could not be measured, 4 bad input
"""


def make_parser() -> CommandParser:
    """The parser of `init`."""
    parser = CommandParser(
        "init",
        usage="[SUBJECT ...] [--ci HOST] [OPTIONS]",
        description="Adopts the gate in the repository that this folder is; overwrites nothing.",
        examples=EXAMPLES,
    )
    add_cli_options(parser, OPTIONS)
    parser.add_argument(
        "--ci",
        choices=("auto", "github", "gitlab", "none"),
        default="auto",
        help="whose workflow (default: auto, by the files and the remote of this repository)",
    )
    parser.add_argument("--no-baseline", action="store_true", help="record no baseline now")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and write nothing")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run `init` and return its exit status.

    Raises:
        BadInputError: the input cannot be used, or something cannot be written.
    """
    settings, own = make_parser().parse_settings(arguments)
    with for_people(settings) as stream:
        answer, status = _init(settings, own, stream)
    if settings.json:
        write_json(settings.json, answer, 0)
    return status


def _init(settings: Settings, own: dict[str, Any], stream: IO[str]) -> tuple[dict[str, Any], int]:
    """See that everything can be used, then write, then record: nothing is left of a mistyped command."""
    from numerics_suite.adoption.pieces import pieces_of, write
    from numerics_suite.reports.adoption import AdoptionPrinter
    from numerics_suite.suite.recording import recording_session

    folder = Path.cwd()
    if not settings.subjects:
        settings = settings.stating(subjects=SHIPPED)
    session = recording_session(settings)
    settings = _with_precisions(settings, session.plan.cells)  # a subject that cannot be used is refused here
    pieces = pieces_of(folder, _asked(settings), _host(folder, own["ci"]))
    printer = AdoptionPrinter(stream=stream, quiet=settings.quiet)
    baselines = settings.baseline or Path(DEFAULT_FOLDER)
    held = baselines.is_dir() and any(baselines.iterdir())
    wanted = not own["no_baseline"] and not held
    if not own["dry_run"]:
        write(folder, pieces)
    printer.files(pieces, dry_run=own["dry_run"])
    answer: dict[str, Any] = {
        "schema_version": 1,
        "command": "init",
        "dry_run": own["dry_run"],
        "files": [_to_json(piece) for piece in pieces],
        "baselines": [],
    }
    status = 0
    printer.baseline(baselines, held=held, wanted=wanted, dry_run=own["dry_run"])
    if wanted and not own["dry_run"]:
        written = write_baselines(session, baselines, force=False, stream=stream)
        answer |= {key: value for key, value in written.to_json().items() if key in {"baselines", "errors"}}
        status = written.exit_status
    printer.next_steps(pieces, baselines, dry_run=own["dry_run"])
    return answer, status


def _asked(settings: Settings) -> Settings:
    """Without where this command's own answer goes and how many work on it, which are no settings of the gate."""
    origins = {name: origin for name, origin in settings.origins.items() if name not in {"json", "quiet", "workers"}}
    return replace(settings, origins=origins)


def _with_precisions(settings: Settings, cells: Sequence[Cell]) -> Settings:
    """The precisions of this device written down, so that the gate asks for the same ones on every machine."""
    if settings.precision is not None:
        return settings
    return settings.stating(precision=tuple(dict.fromkeys(cell.precision for cell in cells)))


def _host(folder: Path, asked: str) -> Host | None:
    from numerics_suite.adoption.workflows import HOSTS, host_of

    if asked == "auto":
        return host_of(folder)
    return next((host for host in HOSTS if host == asked), None)


def _to_json(piece: Piece) -> dict[str, str]:
    return {"path": piece.path.as_posix(), "state": piece.state, "what": piece.what}
