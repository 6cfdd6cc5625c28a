"""`numerics-suite record`: measures every cell and keeps the measurements, to hold another version to them."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from numerics_suite.cli.output import for_people, unfinished_answer, write_json
from numerics_suite.cli.parser import CommandParser
from numerics_suite.core.errors import BadInputError
from numerics_suite.settings.options import add_cli_options

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numerics_suite.baselines.records import Recorded
    from numerics_suite.suite.session import SuiteSession

DEFAULT_FOLDER = ".numerics/baselines"

OPTIONS = (
    *("subjects", "names", "task", "num_labels", "precision", "attn", "device", "require_device"),
    *(
        "extensions",
        "trust_remote_code",
        "allow_pickle",
        "steps",
        "optimizer",
        "lr",
        "max_grad_norm",
        "seed",
        "batch_size",
        "seq_len",
    ),
    *("baseline", "json", "quiet", "workers"),
)

EXAMPLES = """\
  numerics-suite record
      the shipped GLM-4 fixtures, into .numerics/baselines
  numerics-suite record ./my-checkpoint --baseline baselines --precision bf16
      your own checkpoint, to commit beside your code
  numerics-suite record ./my-checkpoint --baseline baselines --force
      again, over what is there

exit status:
  0 written, 2 interrupted, 3 a cell could not be measured, 4 bad input
"""


def make_parser() -> CommandParser:
    """The parser of `record`."""
    parser = CommandParser(
        "record",
        usage="[SUBJECT ...] [--baseline DIR] [OPTIONS]",
        description="Writes baselines: what each cell measures, to compare another version with.",
        examples=EXAMPLES,
    )
    add_cli_options(parser, OPTIONS)
    parser.add_argument("--force", action="store_true", help="overwrite cells that are there already")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run `record` and return its exit status.

    Raises:
        BadInputError: the input cannot be used, or the folder cannot be written.
    """
    settings, own = make_parser().parse_settings(arguments)
    from numerics_suite.suite.recording import recording_session

    folder = settings.baseline or Path(DEFAULT_FOLDER)
    unanswered = unfinished_answer(settings.json, "record", baselines=[], errors=[])
    with for_people(settings) as stream, unanswered as offer:
        written = write_baselines(recording_session(settings), folder, force=own["force"], stream=stream, offer=offer)
    if settings.json:
        write_json(settings.json, written.to_json(), written.exit_status)
    if written.exit_status == 4:
        raise BadInputError("; ".join(dict.fromkeys(written.refused)))
    return written.exit_status


def write_baselines(
    session: SuiteSession,
    folder: Path,
    *,
    force: bool,
    stream: IO[str],
    offer: Callable[..., None] = lambda **_: None,
) -> Written:
    """Measure and save, cell by cell: what is done is kept, whatever comes after; `offer` takes the answer so far.

    Raises:
        BadInputError: the input cannot be used, or the folder cannot be written.
    """
    from numerics_suite.baselines.store import check_writable
    from numerics_suite.core.activity import listening
    from numerics_suite.reports.recording import RecordTerminal
    from numerics_suite.suite.recording import record_cells, skipped_cells

    printer = RecordTerminal(stream=stream, quiet=session.settings.quiet)
    with listening(printer.notice):
        skipped = skipped_cells(session.plan)
    cells = [cell for cell in session.plan.cells if cell not in skipped]
    if not cells:
        message = f"nothing to record: {'; '.join(dict.fromkeys(skipped.values()))}"
        raise BadInputError(message)
    check_writable(folder, cells, force=force)
    written = Written(folder, force=force, printer=printer)

    def take(recorded: Recorded) -> None:
        written.take(recorded)
        content = written.to_json()
        offer(baselines=content["baselines"], errors=content["errors"])

    try:
        with listening(printer.notice):
            record_cells(session, take)
    finally:
        printer.stop()
    return written


class Written:
    """What has been saved so far, and what could not be measured."""

    def __init__(self, folder: Path, *, force: bool, printer: Any) -> None:
        """Into this folder, told by this printer."""
        self.folder, self.force, self.printer = folder, force, printer
        self.files: list[tuple[dict[str, str], Path]] = []
        self.errors: list[dict[str, str]] = []
        self.refused: list[str] = []

    def take(self, recorded: Recorded) -> None:
        """Save a cell as soon as it is measured."""
        from numerics_suite.baselines.store import save

        file: Path | None = None
        if recorded.baseline is not None:
            (file,) = save(self.folder, [recorded.baseline], force=self.force)
            self.files.append((_key(recorded.baseline.cell), file))
        elif recorded.error:
            self.errors.append({**_key(recorded.cell), "error": recorded.error})
            self.refused += [recorded.error] if recorded.bad_input else []
        self.printer.cell(recorded, file)

    @property
    def exit_status(self) -> int:
        """0 where all was written; 4 where nothing else went wrong than that no model can be loaded of the files."""
        if not self.errors:
            return 0
        return 4 if len(self.refused) == len(self.errors) else 3

    def to_json(self) -> dict[str, Any]:
        """The answer of the command; `bytes` are those of the file and of the arrays that it names."""
        baselines = [{**key, "file": str(file), "bytes": _size(file)} for key, file in self.files]
        return {"schema_version": 1, "command": "record", "baselines": baselines, "errors": self.errors}


def _size(file: Path) -> int:
    """Bytes of a subject's file and of the arrays beside it."""
    arrays = file.parent.glob(f"{glob.escape(file.name.removesuffix('.json'))}.*.safetensors")
    return file.stat().st_size + sum(path.stat().st_size for path in arrays)


def _key(cell: Any) -> dict[str, str]:
    return {name: getattr(cell, name) for name in ("subject", "task", "precision", "attn", "device")}
