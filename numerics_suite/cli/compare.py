"""`numerics-suite compare OLD NEW`: two folders of baselines: what is identical, what changed and where it starts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from numerics_suite.cli.output import deliver, refuse_undeliverable, refuse_unwritable, say, write_json
from numerics_suite.cli.parser import CommandParser, add_output_options
from numerics_suite.core.errors import BadInputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numerics_suite.judgement.classify import Comparison

EXAMPLES = """\
  numerics-suite compare baselines-old baselines-new
  numerics-suite compare old new --as my-model=my-model-v2
      one subject under two names
  numerics-suite compare old new --json changes.json --quiet

kinds, worst first:
  missing    the old baseline holds it, the new one does not
  changed    another function in float64: answers, loss, gradients or training
  worse      the same function, with a larger rounding error
  contract   arguments, outputs, dtypes or initialisation that callers rely on
  better     the same function, with a smaller rounding error
  rounding   the same function, other bits, errors of the same size
  identical  the same bits

exit status:
  0 an upgrade changes nothing that matters, 1 missing, changed, worse or
  contract, 4 bad input
"""


def make_parser() -> CommandParser:
    """The parser of `compare`."""
    parser = CommandParser(
        "compare",
        usage="OLD NEW [--as OLD=NEW ...] [OPTIONS]",
        description="Compares two folders of baselines, cell by cell.",
        examples=EXAMPLES,
    )
    parser.add_argument("folders", metavar="OLD NEW", nargs="*", help="folders that record has written")
    parser.add_argument(
        "--as", dest="pairs", metavar="OLD=NEW", action="append", default=[], help="pair subjects of different names"
    )
    parser.add_argument("--report", metavar="DIR", help="write a report here: index.html, and files for CI")
    add_output_options(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run `compare` and return its exit status.

    Raises:
        BadInputError: a folder or a pair cannot be used.
    """
    given = make_parser().parse(arguments)
    if len(given.folders) != 2:
        message = f"compare takes two folders, OLD and NEW; {len(given.folders)} given"
        raise BadInputError(message)
    pairs = [_pair(text) for text in given.pairs]
    report = Path(given.report) if given.report else None
    refuse_unwritable(given.json)
    refuse_undeliverable(report)
    from numerics_suite.baselines.store import load
    from numerics_suite.core.numbers import revived
    from numerics_suite.judgement.classify import FAILING, compare_baselines
    from numerics_suite.reports.comparison import comparison_to_json
    from numerics_suite.reports.documents import ComparisonFile, Documents

    old, new = (Path(folder) for folder in given.folders)
    found = compare_baselines(load(old), load(new), pairs)
    status = int(any(item.kind in FAILING for item in found))
    if given.json != "-":
        _print(found, old=str(old), new=str(new), quiet=given.quiet)
    content = comparison_to_json(found, old=str(old), new=str(new))
    if given.json:
        write_json(given.json, content, status)
    documents = Documents(comparisons=(ComparisonFile(content=revived(content)),))
    deliver(documents, report, silent=given.quiet or given.json == "-")
    return status


def _print(found: Sequence[Comparison], *, old: str, new: str, quiet: bool) -> None:
    """In colour on a terminal; plain lines elsewhere, without loading a library for colours."""
    from numerics_suite.reports.comparison import comparison_lines
    from numerics_suite.reports.lines import sayable

    if sys.stdout.isatty():
        from numerics_suite.reports.terminal import Terminal

        terminal = Terminal(stream=sys.stdout)
        terminal.show(comparison_lines(found, old=old, new=new, quiet=quiet, width=terminal.width))
        return
    for line in comparison_lines(found, old=old, new=new, quiet=quiet):
        say(sayable(line.text, sys.stdout))


def _pair(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        message = f"--as: '{text}' is no pair; write OLD=NEW"
        raise BadInputError(message)
    return old, new
