"""A `bisect` as the page tells it: the boundary, and the versions in the order in which they were tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from numerics_suite.reports.view.advice import Advised, bisected_cures
from numerics_suite.reports.view.causes import sentence_of
from numerics_suite.reports.view.finding_text import where_text
from numerics_suite.reports.view.formats import number

if TYPE_CHECKING:
    from numerics_suite.reports.documents import BisectFile

STATUS = {"good": "passed", "bad": "failed"}
"""How a verdict is signed; every other is as a skipped one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisected:
    """One search.

    Attributes:
        title: what was found.
        facts: labels and texts.
        cures: what to do.
        show: a command that shows it, empty without one.
        steps: version, verdict, status, seconds and a note.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    cures: tuple[Advised, ...]
    show: str
    steps: tuple[tuple[str, str, str, str, str], ...]


def bisected(file: BisectFile) -> Bisected:
    """One `bisect` as the page tells it.

    Args:
        file: of the search.
    """
    content, finding = file.content, file.finding
    what = content.get("what", "version")
    facts = [("first bad", f"{what} {content['first_bad']}"), ("last good", f"{what} {content['last_good']}")]
    if content.get("between"):
        facts.append(("cannot be tried", ", ".join(str(version) for version in content["between"])))
    facts += [(name, str(content[name])) for name in ("subject", "check", "kind") if content.get(name)]
    if finding is not None:
        facts += [("where", where_text(finding))] if where_text(finding) else []
        facts += [("why", finding.explanation)] if finding.explanation else []
    if content.get("candidates"):
        facts.append(("tried", f"{len(content['tested'])} of {content['candidates']} versions"))
    facts += [("note", str(note)) for note in content.get("notes", ())]
    title = sentence_of(finding) if finding is not None else f"{what} {content['first_bad']} is the first bad version"
    return Bisected(
        title=title,
        facts=tuple(facts),
        cures=bisected_cures(file),
        show=str(content.get("show") or ""),
        steps=tuple(
            (
                str(step["version"]),
                str(step["verdict"]),
                STATUS.get(step["verdict"], "skipped"),
                number(step["duration_s"]),
                " · ".join(part for part in (step.get("reason") or "", "kept" if step.get("reused") else "") if part),
            )
            for step in content["tested"]
        ),
    )
