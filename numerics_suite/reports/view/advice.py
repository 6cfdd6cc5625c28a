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
    "wrong-gradient": "look for detach(), torch.no_grad, a custom autograd.Function or a hook",
    "dead-gradient": "look for detach(), torch.no_grad or requires_grad_(False) between the loss and these parameters",
    "semantic-error": "compare the code, and the keys of config.json that it reads, with the family's published definition",
    "padding-leak": "look at what the code does with attention_mask and position_ids",
    "batch-leak": "look for a sum or a norm over the rows of a batch, and for state that is kept from an earlier call",
    "future-leak": "look at the causal mask: whether it is applied, and where its diagonal lies",
    "packing-leak": "look at where position_ids restart and where the attention of a packed row ends",
    "cache-mismatch": "look at what is appended to the cache, and at the positions of the new tokens",
    "wrong-positions": "look at position_ids and the rotary embedding: its base, its scaling and the part of a head that it rotates",
    "wrong-pooling": "look at how the last real token is found: by pad_token_id, by attention_mask, or as the last column",
    "wrong-loss": "look at the shift of the labels, at -100 (ignore_index), and at what the sum is divided by",
    "attention-mismatch": "compare mask, scale and heads of the two attentions",
    "nondeterminism": "look for dropout in eval mode, random numbers and state that is kept between calls",
    "invalid-operation": "guard the operation against 0/0, inf - inf and the root of a negative number",
    "fully-masked-row": "let each query see at least one key, as with padding behind the tokens",
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
