"""A `bisect` as every printer tells it: the boundary, what happens there, and the versions in the order in which they were tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from numerics_suite.core.text import listed
from numerics_suite.reports.view.advice import Advised, bisected_cures
from numerics_suite.reports.view.causes import sentence_of
from numerics_suite.reports.view.finding_text import where_text
from numerics_suite.reports.view.formats import number

if TYPE_CHECKING:
    from numerics_suite.reports.documents import BisectFile

STATUS = {"good": "passed", "bad": "failed"}
"""How a verdict is signed; every other is as a skipped one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """One search.

    Attributes:
        why: what it means, empty where that is not known.
        show: a command that shows it, empty without one.
        steps: version, verdict, status, seconds and a note.
    """

    title: str
    facts: tuple[tuple[str, str], ...]
    why: str
    cures: tuple[Advised, ...]
    show: str
    steps: tuple[tuple[str, str, str, str, str], ...]


def boundary_of(file: BisectFile, *, diagnosed: bool = True) -> Boundary:
    """One `bisect`."""
    content, finding = file.content, file.finding
    what, bad, good = content.get("what", "version"), content["first_bad"], content["last_good"]
    facts = [("last good", str(good)), ("first bad", str(bad))]
    if content.get("between"):
        names = listed([str(version) for version in content["between"]], 6)
        facts.append(("between", f"{names} cannot be tried: the change is in one of them or in {bad}"))
    facts += [(name, str(content[name])) for name in ("subject", "check", "kind") if content.get(name)]
    facts += [("where", where_text(finding) or "no module is named")] if finding is not None else []
    if content.get("candidates"):
        facts.append(("tried", f"{len(content['tested'])} of {content['candidates']} versions"))
    facts += [("note", str(note)) for note in content.get("notes", ())]
    said = f": {sentence_of(finding, diagnosed=diagnosed)}" if finding is not None else "."
    return Boundary(
        title=f"{what} {bad} is the first bad version, {good} is good{said}",
        facts=tuple(facts),
        why=finding.explanation if finding is not None else "",
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
