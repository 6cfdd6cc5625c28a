"""The summary in Markdown: the verdict first, what to do, the table of versions, then a short block for each finding.

It is what a step of GitHub Actions shows, and what `summary.md` of a report is. What it says is what the HTML says.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from numerics_suite.core.text import listed
from numerics_suite.reports.markup import code, fenced, folded, joined, table, text
from numerics_suite.reports.view.bisections import boundary_of
from numerics_suite.reports.view.cards import Card, cards_of
from numerics_suite.reports.view.differences import Differences, differences_of
from numerics_suite.reports.view.formats import many
from numerics_suite.reports.view.overview import Story, about, story_of
from numerics_suite.reports.view.places import Places, places_of
from numerics_suite.reports.view.problems import problems_of
from numerics_suite.reports.view.sections import reasons_of
from numerics_suite.reports.view.version_ranges import sequences

if TYPE_CHECKING:
    from numerics_suite.core.versions import MatrixCell, Versions
    from numerics_suite.reports.documents import BisectFile, Documents, Matrix

MOST_BYTES = 1_000_000
"""Of a step's summary; GitHub shows none of one that is larger than 1 MiB."""

MOST_ROWS = 60
"""Rows of a table; the HTML has them all."""

BASELINE = "baseline"

Clean = Callable[[object], str]
"""What is done to every text of the documents before it is written."""


def summary_markdown(documents: Documents, most: int = MOST_BYTES) -> str:
    """The summary; the same text for the same documents.

    Args:
        documents: everything that it covers.
        most: bytes at most, in UTF-8.
    """
    places = places_of(documents)
    problems = problems_of(places)
    cards = cards_of(problems)
    story = story_of(documents, places, problems, cards)
    blocks = [
        *_head(story, about(documents)),
        *(versions_table(matrix, places, at) for at, matrix in enumerate(documents.matrices)),
        *(block for bisection in documents.bisections for block in bisect_blocks(bisection)),
        *(block for comparison in documents.comparisons for block in comparison_blocks(differences_of(comparison))),
        *(finding_block(card, heading=f"### {card.number}. ") for card in cards if card.status == "failed"),
        _errors(places),
        _accepted(cards),
        _skipped(places),
        notes_block(documents.every_note),
    ]
    return joined(blocks, most, _rest, lambda block: len(block.encode("utf-8", "replace")))


def _rest(count: int) -> str:
    return f"*{many(count, 'part')} more than there is room for: see the report's `index.html`.*"


def _head(story: Story, told_of: str) -> Iterator[str]:
    yield f"## numerics-suite: {story.word}"
    counts = " · ".join(f"{number:,} {status}" for status, number in story.counts)
    yield f"**{text(story.headline)}**" + (f"\n\n{counts}" if counts else "")
    cures = [f"- {text(cure.text)}" for issue in story.issues[:1] for cure in issue.cures]
    yield "\n".join(["What to do:", "", *cures]) if cures else ""
    yield text(told_of) if told_of else ""


def finding_block(card: Card, *, heading: str, clean: Clean = str, extra: Sequence[str] = ()) -> str:
    """One finding: what, where, how much, what to do, how to see it again; the rest opens at a click.

    Args:
        card: of the finding.
        heading: Markdown that stands before its title.
        clean: of every text.
        extra: lines of Markdown that come first.
    """
    lines = [
        f"- {code(card.check)} on {text(clean(card.scope))}",
        *(f"- **{label}** {text(clean(value))}" for label, value in card.lines),
        *(f"- **fix** {text(clean(fix))}" for fix in card.fixes),
    ]
    parts = [
        f"{heading}{text(clean(card.sentence))}",
        "\n".join([*extra, *lines]),
        fenced(clean(card.command), "sh") if card.command else "",
        folded("Why, evidence, batch and script", "\n".join(_details(card, clean))),
    ]
    return "\n\n".join(part for part in parts if part)


def _details(card: Card, clean: Clean) -> Iterator[str]:
    if card.why:
        yield f"{text(clean(card.why))}\n"
    for version, subject, cells in card.cells:
        lead = f"{text(version)}: " if version else ""
        yield f"- **cells** {lead}{text(clean(subject))}: {text(clean(cells))}"
    if card.more:
        yield f"- and {many(card.more, 'row')} more"
    if card.measured:
        yield f"- **measured** {text(clean(card.measured))}"
    yield from (f"- **{text(clean(name))}** {text(clean(value))}" for name, value in card.evidence)
    if card.batch:
        yield f"- **batch** {code(clean(card.batch))}"
    if card.script_path:
        yield f"- **script** {code(clean(card.run_script))}"


def versions_table(
    matrix: Matrix, places: Places, index: int, only: Container[Versions] | None = None, clean: Clean = str
) -> str:
    """What every version of a matrix says, neighbours that say the same in one row.

    Args:
        matrix: its cells.
        places: every result of the report.
        index: of the matrix in the report.
        only: the versions to include; all without it.
        clean: of every text.
    """
    tables = []
    for package, within, sources in sequences(places.of_matrix(index)):
        cells = [matrix.result.cells[source.at] for source in sources]
        told = [
            (str(getattr(cell.held, package) or "?"), _said(cell, clean))
            for cell in cells
            if only is None or cell.held in only
        ]
        rows = []
        for said, members in groupby(told, key=lambda item: item[1]):
            names = [name for name, _ in members]
            label = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
            rows.append((code(label), *said))
        more = f"\n\n{many(len(rows) - MOST_ROWS, 'row')} more in the report." if len(rows) > MOST_ROWS else ""
        made = table((text(package), "status", "did not pass", "changed"), rows[:MOST_ROWS])
        if made:
            tables.append((f"With {text(within)}:\n\n" if within else "") + made + more)
    return "\n\n".join(tables)


def _said(cell: MatrixCell, clean: Clean) -> tuple[str, str, str]:
    """Status, what did not pass, and what changed, as Markdown."""
    checks = list(dict.fromkeys(failure.check for failure in cell.failures))
    failing = listed([code(check) for check in checks], 4)
    reason = text(clean(cell.reason)) if cell.reason and not checks else ""
    status = f"**{cell.status}**" if cell.status in {"failed", "error"} else text(cell.status)
    changes: dict[tuple[str, str, str], list[str]] = {}
    for change in cell.changes:
        detail = f" ({text(clean(change.details[0]))})" if change.details else ""
        where = f" in {code(clean(change.module))}" if change.module else detail
        changes.setdefault((change.kind, where, change.against), []).append(f"{change.subject} {change.precision}")
    told = [
        f"{text(kind)} against {text(other)}{where}: {text(clean(listed(list(dict.fromkeys(cells)), 3)))}"
        for (kind, where, other), cells in changes.items()
    ]
    return status, failing or reason, "; ".join(told[:4]) + (f" and {len(told) - 4} more" if len(told) > 4 else "")


def bisect_blocks(bisection: BisectFile, clean: Clean = str) -> Iterator[str]:
    """The boundary, and the command that shows it."""
    found = boundary_of(bisection)
    yield f"### {text(clean(found.title))}"
    yield "\n".join(f"- **{label}** {text(clean(value))}" for label, value in found.facts)
    yield fenced(clean(found.show), "sh") if found.show else ""


def comparison_blocks(found: Differences, clean: Clean = str) -> Iterator[str]:
    """What two baselines differ in, worst first."""
    counts = ", ".join(f"{number:,} {text(kind)}" for kind, number in found.counts) or "nothing to compare"
    yield f"### Baselines {code(clean(found.old))} and {code(clean(found.new))}\n\n{counts}"
    rows = [
        (
            f"**{text(entry.kind)}**",
            text(clean(entry.cells)),
            code(clean(entry.module)),
            text(entry.ratio),
            text(clean("; ".join(entry.why) or entry.meaning)),
        )
        for entry in found.entries
    ]
    yield table(("kind", "cells", "starts in", "error ratio", "why"), rows[:MOST_ROWS])
    yield f"{many(len(rows) - MOST_ROWS, 'row')} more in the report." if len(rows) > MOST_ROWS else ""


def _errors(places: Places) -> str:
    rows = [(text(one.checks), text(one.where), text(one.reason)) for one in reasons_of(places, "error")]
    made = table(("check", "on", "reason"), rows[:MOST_ROWS])
    return f"### Could not be carried out\n\n{made}" if made else ""


def _accepted(cards: Iterable[Card]) -> str:
    rows = [
        (code(card.check), text(card.scope), text(card.sentence), text(card.reason))
        for card in cards
        if card.status == "accepted"
    ]
    made = table(("check", "on", "finding", "why it is accepted"), rows[:MOST_ROWS])
    return f"### Accepted\n\n{made}" if made else ""


def _skipped(places: Places) -> str:
    reasons = reasons_of(places, "skipped")
    rows = [(f"{one.count:,}", text(one.checks), text(one.where), text(one.reason)) for one in reasons]
    total = sum(one.count for one in reasons)
    return folded(f"{many(total, 'check')} skipped", table(("", "checks", "on", "reason"), rows[:MOST_ROWS]))


def notes_block(notes: Iterable[str], clean: Clean = str) -> str:
    """What a person should see, as a list."""
    told = [f"- {text(clean(note))}" for note in notes]
    return "\n".join(["### Notes", "", *told[:MOST_ROWS]]) if told else ""
