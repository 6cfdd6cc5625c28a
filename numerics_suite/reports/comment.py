"""The text of a pull request's comment: what changed against earlier results, and nothing else.

The same results give the same text on every machine: no time, no path of a machine, one order. The first line marks the
comment, so that a later run finds it and writes over it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from numerics_suite.core.records import CheckResult
from numerics_suite.core.text import listed
from numerics_suite.judgement.classify import FAILING
from numerics_suite.reports.against import Against, Turn, against
from numerics_suite.reports.documents import BisectFile, ComparisonFile, Documents
from numerics_suite.reports.markdown import (
    MOST_ROWS,
    bisect_blocks,
    comparison_blocks,
    finding_block,
    notes_block,
    versions_table,
)
from numerics_suite.reports.markup import code, joined, table, text, without_folders
from numerics_suite.reports.numbers import shown
from numerics_suite.reports.view.cards import cards_of
from numerics_suite.reports.view.differences import differences_of
from numerics_suite.reports.view.finding_text import cells_text
from numerics_suite.reports.view.formats import many
from numerics_suite.reports.view.overview import WORDS, verdict_of
from numerics_suite.reports.view.places import CheckCell
from numerics_suite.reports.view.problems import Problem, problems_of

MARKER = "<!-- numerics-suite -->"
"""The first line: by it the comment of an earlier run is found."""

MOST_LETTERS = 65_536
"""Of a comment on GitHub; GitLab takes more."""


def comment_markdown(documents: Documents, earlier: Documents | None = None, most: int = MOST_LETTERS) -> str:
    """The comment.

    Args:
        documents: everything that it covers.
        earlier: what they are held against; without it everything is new.
        most: letters at most.
    """
    found = against(documents, earlier)
    known = earlier.every_note if earlier is not None else ()
    problems = problems_of(found.places)
    new = _new_problems(problems, found)
    word = WORDS[verdict_of(documents)]
    comparisons = [_changed_only(item, earlier) for item in documents.comparisons]
    blocks = [
        f"{MARKER}\n## numerics-suite: {word}",
        _counts(found, problems, new, held=earlier is not None),
        _packages(found),
        *_versions(documents, found, earlier),
        *_findings(new, found),
        *(block for item in _new_bisections(documents, earlier) for block in bisect_blocks(item, without_folders)),
        *(
            block
            for item in comparisons
            if item.content["subjects"]
            for block in comparison_blocks(differences_of(item), without_folders)
        ),
        _turned("Fixed", found.of("fixed"), _was),
        _turned("Accepted from now on", found.of("accepted"), _why_accepted),
        _turned("Could not be carried out", found.of("broken"), lambda turn: turn.told.reason or "no reason given"),
        _turned("Not asked any more", found.of("unasked"), lambda turn: turn.reason),
        notes_block((note for note in documents.every_note if note not in known), without_folders),
    ]
    told = [block for block in blocks if block]
    if len(told) == 2 and earlier is not None:
        told.append("Nothing changed against the earlier results.")
    return joined(told, most, _rest)


def _rest(count: int) -> str:
    return f"*{many(count, 'part')} more than there is room for: see the report.*"


def _new_problems(problems: Sequence[Problem], found: Against) -> list[Problem]:
    """Problems with those of their places alone that are new."""
    new = {_identity(turn.label, turn.told) for turn in found.of("new")}
    kept = []
    for problem in problems:
        places = tuple(place for place in problem.places if _identity(place.source.label, place.result) in new)
        if places and not problem.accepted:
            kept.append(replace(problem, places=places))
    return kept


def _identity(label: str, result: CheckResult) -> tuple[str, str, str]:
    return label, result.id, result.cell.task


def _counts(found: Against, problems: Sequence[Problem], new: Sequence[Problem], *, held: bool) -> str:
    if not held:
        return many(len(new), "finding") if new else ""
    still = {_identity(turn.label, turn.told) for turn in found.of("still")}
    known = sum(
        any(_identity(place.source.label, place.result) in still for place in problem.places) for problem in problems
    )
    fixed = len({(turn.told.check, _cause(turn)) for turn in found.of("fixed")})
    parts = [f"**{many(len(new), 'new finding')}**" if new else "no new finding"]
    parts += [f"{fixed:,} fixed"] if fixed else []
    parts += [f"{known:,} still there"] if known else []
    return ", ".join(parts)


def _packages(found: Against) -> str:
    rows = [f"{text(name)} {code(before)} → {code(now)}" for name, before, now in found.packages]
    return listed(rows, 12)


def _findings(new: Sequence[Problem], found: Against) -> Iterator[str]:
    before = {_identity(turn.label, turn.told): turn for turn in found.of("new")}
    for card, problem in zip(cards_of(new), new, strict=True):
        turn = before[_identity(problem.worst.source.label, problem.worst.result)]
        line = _before(turn, problem.worst)
        yield finding_block(card, heading="### ", clean=without_folders, extra=[f"- **before** {line}"] if line else [])


def _before(turn: Turn, worst: CheckCell) -> str:
    """What the earlier results say of the same cell."""
    earlier, finding = turn.before, worst.result.finding
    if earlier is None or finding is None:
        return ""
    name = finding.evidence.get("measurement")
    value = earlier.measurements.get(str(name))
    measured = f", {text(name)} {text(shown(value))}" if value is not None else ""
    cause = f" ({code(earlier.finding.cause)})" if earlier.status == "failed" and earlier.finding is not None else ""
    return f"{text(earlier.status)}{cause}{measured}"


def _versions(documents: Documents, found: Against, earlier: Documents | None) -> Iterator[str]:
    """The rows of versions that say something else than they did, or that are new."""
    known = {} if earlier is None else {cell.held: cell for one in earlier.matrices for cell in one.result.cells}
    for at, matrix in enumerate(documents.matrices):
        changed = {
            cell.held
            for cell in matrix.result.cells
            if cell.held not in known
            or (known[cell.held].status, known[cell.held].failures, known[cell.held].changes)
            != (cell.status, cell.failures, cell.changes)
        }
        made = versions_table(matrix, found.places, at, only=changed, clean=without_folders)
        if made:
            yield made if earlier is None else f"### Versions that changed\n\n{made}"


def _changed_only(comparison: ComparisonFile, earlier: Documents | None) -> ComparisonFile:
    """The differences that the earlier comparison does not have; those that fail and `better` ones, without one."""
    known = [item for one in earlier.comparisons for item in one.content["subjects"]] if earlier is not None else []
    told = {_difference(item) for item in known}
    kept = [
        item
        for item in comparison.content["subjects"]
        if (_difference(item) not in told if known else item["kind"] in {*FAILING, "better"})
    ]
    return replace(comparison, content={**comparison.content, "subjects": kept})


def _new_bisections(documents: Documents, earlier: Documents | None) -> list[BisectFile]:
    known = {_boundary(item) for item in earlier.bisections} if earlier is not None else set()
    return [item for item in documents.bisections if _boundary(item) not in known]


def _boundary(bisection: BisectFile) -> tuple[str, ...]:
    names = ("what", "subject", "check", "last_good", "first_bad")
    return tuple(str(bisection.content.get(name)) for name in names)


def _difference(item: dict[str, object]) -> tuple[object, ...]:
    return tuple(item.get(name) for name in ("subject", "task", "precision", "attn", "kind", "module"))


def _turned(title: str, turns: Iterable[Turn], reason: Callable[[Turn], str]) -> str:
    """Answers that turned, those alike in one row."""
    cells: dict[tuple[str, str, str, str], list[Turn]] = {}
    for turn in turns:
        cells.setdefault((turn.told.check, turn.told.cell.subject, reason(turn), turn.label), []).append(turn)
    labels: dict[tuple[str, str, str, str], list[str]] = {}
    for (check, subject, why, label), members in cells.items():
        where = cells_text([turn.told.cell for turn in members])
        labels.setdefault((check, subject, where, why), []).append(label)
    rows = [
        (
            code(check),
            text(without_folders(subject)),
            text(where) + "".join(f"; {text(listed(told, 4))}" for told in [[one for one in several if one]] if told),
            text(without_folders(why)),
        )
        for (check, subject, where, why), several in labels.items()
    ]
    more = f"\n\n{many(len(rows) - MOST_ROWS, 'row')} more." if len(rows) > MOST_ROWS else ""
    made = table(("check", "subject", "cells", "why"), rows[:MOST_ROWS])
    return f"### {title}\n\n{made}{more}" if made else ""


def _was(turn: Turn) -> str:
    assert turn.before is not None
    return f"was {_cause(turn)}" if turn.before.status == "failed" else "could not be carried out before"


def _cause(turn: Turn) -> str:
    finding = turn.before.finding if turn.before is not None else None
    return finding.cause if finding is not None else ""


def _why_accepted(turn: Turn) -> str:
    finding = turn.told.finding
    return f"{finding.cause if finding is not None else ''}: {turn.told.reason or 'no reason given'}"
