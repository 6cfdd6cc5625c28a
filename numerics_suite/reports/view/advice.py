"""What to do about a finding: another version where one is good, and the cures that were tried."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numerics_suite.core.records import Finding, Remedy
    from numerics_suite.reports.documents import BisectFile
    from numerics_suite.reports.view.problems import Problem
    from numerics_suite.reports.view.version_ranges import Span

PLAIN_VERSIONS = ("newer-version", "pin-version")
"""Remedies that say no more than the versions that were tried."""

MOST = 4
"""Pieces of advice of one issue."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advised:
    """One thing to do.

    Attributes:
        tried: True where it worked, False where it did not, None where it was not tried.
        effect: what came of it, or why it was not tried.
        advice: it is no cure that could be tried.
    """

    action: str
    tried: bool | None = None
    effect: str = ""
    advice: bool = False

    @property
    def told(self) -> str:
        """What is known of it: `tried, works: finite; loss 7.24 → 4.9 in 5 steps`."""
        if self.tried is None:
            return self.effect or ("" if self.advice else "not tried")
        return ": ".join(part for part in (TRIED[self.tried], self.effect) if part)

    @property
    def text(self) -> str:
        """Both in one line."""
        return " -- ".join(part for part in (self.action, self.told) if part)


LOOK = {
    "wrong-gradient": "look at the place above for detach(), torch.no_grad, a custom autograd.Function or a hook",
    "semantic-error": "compare the code at the place above, and the keys of config.json that it reads, with the family's published definition",
}
"""Where to look, by cause, where no remedy is known to work."""

TRIED = {True: "tried, works", False: "tried, no help"}
NOT_HERE = "does not apply"
"""How the effect begins of a remedy that is for another model than this."""


def advice_on(problems: Sequence[Problem]) -> tuple[Advised, ...]:
    """What to do about findings of one cause: versions first, then cures that work, then untried ones."""
    versions = list(_versions(problems[0].spans))
    cures = list(_cures([problem.finding for problem in problems], leave_out=PLAIN_VERSIONS if versions else ()))
    return _useful([*versions, *cures])


def bisected_cures(bisection: BisectFile) -> tuple[Advised, ...]:
    """What to do about what `bisect` found."""
    content = bisection.content
    stay = Advised(action=f"stay with {content.get('what', 'version')} {content['last_good']}", tried=True)
    findings = [] if bisection.finding is None else [bisection.finding]
    return _useful([stay, *_cures(findings, leave_out=PLAIN_VERSIONS)])


def _useful(advised: Sequence[Advised]) -> tuple[Advised, ...]:
    """Cures that did not help appear only where there is nothing else, and cures for another model never."""
    apply = [item for item in advised if not item.effect.startswith(NOT_HERE)]
    useful = [item for item in apply if item.tried is not False]
    return tuple((useful or apply)[:MOST])


def _cures(findings: Sequence[Finding], leave_out: Sequence[str]) -> Iterator[Advised]:
    """Where to look, where nothing works; then what was tried."""
    remedies: dict[str, Remedy] = {}
    for finding in findings:
        for remedy in finding.remedies:
            known = remedies.get(remedy.name)
            if known is None or (known.verified is not True and remedy.verified is not None):
                remedies[remedy.name] = remedy
    if (look := LOOK.get(findings[0].cause) if findings else None) and not any(r.verified for r in remedies.values()):
        yield Advised(action=look, advice=True)
    for wanted in (True, None, False):
        for remedy in remedies.values():
            if remedy.verified is wanted and remedy.name not in leave_out:
                yield _cure(remedy)


def _versions(spans: Sequence[Span]) -> Iterator[Advised]:
    for span in spans[:1]:
        older = f"{span.package} {span.last_good}" if span.last_good else ""
        newer = f"{span.package} {span.repaired} or newer" if span.repaired else ""
        if newer:
            text = f"use {newer}{f', or stay with {older}' if older else ''}"
            yield Advised(action=f"{text}; leave out {span.bad}", tried=True)
        elif older:
            yield Advised(action=f"stay with {older}", tried=True)


def _cure(remedy: Remedy) -> Advised:
    beside = f" (with {', '.join(remedy.together)})" if remedy.together else ""
    return Advised(action=f"{remedy.description}{beside}", tried=remedy.verified, effect=remedy.effect)
