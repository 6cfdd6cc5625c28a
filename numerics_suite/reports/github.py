"""What a step of GitHub Actions shows: findings as annotations, and the summary below the step.

Annotations are lines on standard output (`::error file=…::…`). They are written only where GITHUB_ACTIONS is true, and
neither with `--quiet` nor with `--json -`: then standard output is the user's. The summary is a file that the runner
names, so it is written whatever the output is. A finding is shown on the model's line where that file lies in the repository.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from numerics_suite.judgement.classify import FAILING
from numerics_suite.reports.comparison import MEANS
from numerics_suite.reports.documents import Documents
from numerics_suite.reports.lines import cut, printable
from numerics_suite.reports.markdown import summary_markdown
from numerics_suite.reports.sources import SourceLine, Sources
from numerics_suite.reports.streams import abandon
from numerics_suite.reports.view.bisections import boundary_of
from numerics_suite.reports.view.cards import Card, cards_of
from numerics_suite.reports.view.formats import many
from numerics_suite.reports.view.places import Places, places_of
from numerics_suite.reports.view.problems import problems_of
from numerics_suite.reports.view.sections import reasons_of

MOST = 10
"""Errors of one step that GitHub shows."""

LARGEST_SUMMARY = 1_048_576
"""Bytes of all that one step writes to its summary; GitHub shows nothing of more."""

LEFT = 1_000
"""Bytes below which a summary says nothing worth reading."""

LONGEST, LONGEST_TITLE = 2_000, 200
"""Letters of one annotation, and of its title."""

SUMMARY = "GITHUB_STEP_SUMMARY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotation:
    """One message at one place."""

    title: str
    text: str
    place: SourceLine | None = None


def in_actions() -> bool:
    """Whether this is a step of GitHub Actions."""
    return os.environ.get("GITHUB_ACTIONS") == "true"


def tell_github(documents: Documents, stream: IO[str] | None) -> None:
    """Annotate and append the summary, where this is a step of GitHub Actions; elsewhere nothing.

    Args:
        documents: to report.
        stream: standard output; None where it is somebody else's, and then nothing is annotated.
    """
    if not in_actions():
        return
    if stream is not None:
        try:
            stream.write("".join(f"{line}\n" for line in annotation_lines(documents)))
            stream.flush()
        except BrokenPipeError:
            abandon(stream)
    path = os.environ.get(SUMMARY)
    if path:
        append_summary(Path(path), documents)


def append_summary(path: Path, documents: Documents) -> None:
    """Add the summary to what the step has written already; a file that cannot be written is reported and ends nothing."""
    try:
        room = LARGEST_SUMMARY - (path.stat().st_size if path.exists() else 0) - 2
        if room < LEFT:
            return
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" + summary_markdown(documents, most=room))
    except OSError as error:
        sys.stderr.write(f"numerics-suite: the summary of this step cannot be written: {error.strerror or error}\n")


def annotation_lines(documents: Documents, root: Path | None = None) -> list[str]:
    """The lines that the runner takes as annotations: the worst first, and how many more there are.

    Args:
        documents: to report.
        root: of the repository, None to look for it.
    """
    told = list(_annotations(documents, root))
    lines = [_line("error", one) for one in told[:MOST]]
    if len(told) > MOST:
        text = f"{many(len(told) - MOST, 'more problem')}; all of them are in the summary of this step"
        lines.append(_line("notice", Annotation(title="numerics-suite", text=text)))
    return lines


def _line(kind: str, annotation: Annotation) -> str:
    facts = {"title": annotation.title}
    if annotation.place is not None:
        facts = {"file": annotation.place.path, "line": str(annotation.place.line), **facts}
    told = ",".join(f"{name}={_property(value)}" for name, value in facts.items())
    return f"::{kind} {told}::{_data(annotation.text)}"


def _data(value: str) -> str:
    """A message as the runner wants it: `%` and line ends as their numbers."""
    return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(value: str) -> str:
    """A property as the runner wants it: what ends one too."""
    return _data(value).replace(":", "%3A").replace(",", "%2C")


def _annotations(documents: Documents, root: Path | None) -> Iterator[Annotation]:
    places = places_of(documents)
    sources = Sources(documents, root)
    problems = problems_of(places)
    for problem, card in zip(problems, cards_of(problems), strict=True):
        if not problem.accepted:
            yield _of_card(card, sources.find(problem.finding.source))
    for comparison in documents.comparisons:
        for item in comparison.content["subjects"]:
            if item["kind"] in FAILING:
                cell = "/".join(str(item[name]) for name in ("subject", "precision", "attn") if item.get(name))
                first = f", first in {item['module']}" if item.get("module") else ""
                yield _made(f"{item['kind']}: {cell}", [f"{MEANS[item['kind']]}{first}"])
    for bisection in documents.bisections:
        found = boundary_of(bisection)
        yield _made(found.title, [f"{label}: {value}" for label, value in found.facts])
    yield from _of_errors(places)
    yield from _of_runs(documents)


def _of_card(card: Card, place: SourceLine | None) -> Annotation:
    own = place if place is not None and place.root == "repository" else None
    return _made(card.sentence, list(card.told), own)


def _of_errors(places: Places) -> Iterator[Annotation]:
    for one in reasons_of(places, "error"):
        yield _made(f"Could not be carried out: {one.checks}", [one.reason, one.where])
    for source in places.sources:
        if source.cell is not None and source.cell.status == "error" and not source.results:
            yield _made(f"Could not be carried out: {source.label}", [source.cell.reason or "no reason given"])


def _of_runs(documents: Documents) -> Iterator[Annotation]:
    """What makes a run fail though no check of it does."""
    for run in documents.every_run:
        told = {result.status for result in run.result.checks}
        if run.result.exit_status and not told & {"failed", "error"}:
            notes = list(run.result.notes) or [f"exit status {run.result.exit_status}"]
            yield _made("The run does not pass", notes)


def _made(title: str, lines: list[str], place: SourceLine | None = None) -> Annotation:
    """A title that is too long stands whole in the text."""
    lines = [title, *lines] if len(title) > LONGEST_TITLE else lines
    text = "\n".join(printable(line) for line in lines if line)
    return Annotation(title=cut(printable(title), LONGEST_TITLE), text=text[:LONGEST], place=place)
