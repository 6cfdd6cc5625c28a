"""`numerics-suite report RESULTS…`: files that `--json` wrote, as a folder that people and their tools read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.cli.output import refuse_unwritable, say, write_json
from numerics_suite.cli.parser import CommandParser, add_output_options
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.switch import switch_off

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from numerics_suite.reports.documents import Documents

EXAMPLES = """\
  numerics-suite report results.json --out report
      report/index.html for people; junit.xml, results.sarif, summary.md and
      comment.md for CI
  numerics-suite report results.json --out report --against main.json
      comment.md tells only what changed since main.json
  numerics-suite report .numerics/matrix --out report
      the matrix that is kept there

RESULTS are files that check, matrix, bisect or compare wrote with --json, or
folders of them: of a folder, the results files in it count, and where there
is none, a results.json in each of its folders. In GitHub Actions the summary
of the step is written too, and findings are annotations unless --quiet or
--json - is given.

exit status:
  0 written, whatever the results say; 4 bad input
"""

RESULTS = "results.json"
COMMANDS = frozenset({"check", "matrix", "bisect", "compare"})
"""Whose files a folder is searched for."""


def make_parser() -> CommandParser:
    """The parser of `report`."""
    parser = CommandParser(
        "report",
        usage="RESULTS ... --out DIR [--against OLD] [OPTIONS]",
        description="Writes HTML, JUnit, SARIF and Markdown from results files.",
        examples=EXAMPLES,
    )
    parser.add_argument("results", metavar="RESULTS", nargs="*", help="results files, or folders of them")
    parser.add_argument("--out", metavar="DIR", help="folder of the report; files of an earlier report are replaced")
    parser.add_argument("--against", metavar="OLD", help="earlier results: comment.md tells what changed since")
    parser.add_argument("--no-extensions", action="store_true", help="without the reporters that other packages add")
    add_output_options(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run `report` and return its exit status.

    Raises:
        BadInputError: there are no results, or the folder cannot be written.
    """
    given = make_parser().parse(arguments)
    _refuse_nonsense(given)
    refuse_unwritable(given.json)
    if given.no_extensions:
        switch_off()
    from numerics_suite.reports.documents import read_documents
    from numerics_suite.reports.github import tell_github
    from numerics_suite.reports.report import ensure_report, write_report
    from numerics_suite.reports.view.overview import verdict_of

    folder = Path(given.out)
    documents = _labelled(read_documents(list(_files(given.results))))
    earlier = read_documents(list(_files([given.against]))) if given.against else None
    ensure_report(folder, "--out")
    written = write_report(folder, documents, earlier, "--out")
    quiet = given.quiet or given.json == "-"
    if not quiet:
        for path in written:
            say(str(path))
        for note in documents.notes:
            say(f"note: {note}")
    tell_github(documents, None if quiet else sys.stdout)
    if given.json:
        write_json(given.json, _as_json(written, documents, verdict_of(documents)), 0)
    return 0


def _refuse_nonsense(given: argparse.Namespace) -> None:
    message = None
    if not given.results:
        message = "report: no RESULTS given; a file that --json wrote, or a folder of them"
    elif not given.out:
        message = "report: --out DIR is missing"
    if message is not None:
        raise BadInputError(message)


def _files(given: Sequence[str]) -> Iterator[Path]:
    """Every file once, in the order in which they are given; a folder's in the order of their names."""
    seen: set[Path] = set()
    for text in given:
        path = Path(text)
        found = _in_folder(path) if path.is_dir() else [path]
        for file in found:
            if file.resolve() not in seen:
                seen.add(file.resolve())
                yield file


def _in_folder(folder: Path) -> list[Path]:
    try:
        direct = [path for path in sorted(folder.glob("*.json")) if _is_results(path)]
        found = direct or [path for path in sorted(folder.glob(f"*/{RESULTS}")) if _is_results(path)]
    except OSError as error:
        message = f"cannot read {folder}: {error.strerror or error}"
        raise BadInputError(message) from None
    if not found:
        message = f"{folder}: no results file in this folder; give a file that --json wrote"
        raise BadInputError(message)
    return found


def _is_results(path: Path) -> bool:
    """Whether a file says that it is one; what is wrong with it is said when it is read."""
    from numerics_suite.core.json_text import read_json_text

    try:
        content = read_json_text(path)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("command") in COMMANDS and "planned" not in content


def _labelled(documents: Documents) -> Documents:
    """Runs whose files have the same name get their folder in their label."""
    from dataclasses import replace

    labels = [run.label for run in documents.runs]
    runs = tuple(
        replace(run, label=f"{run.path.resolve().parent.name}/{run.label}")
        if run.path is not None and labels.count(run.label) > 1
        else run
        for run in documents.runs
    )
    return replace(documents, runs=runs)


def _as_json(written: Sequence[Path], documents: Documents, verdict: str) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "command": "report",
        "verdict": verdict,
        "files": [str(path) for path in written],
        "notes": list(documents.notes),
    }
