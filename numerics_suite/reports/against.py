"""What changed against earlier results: which findings are new, which are gone, and what is not asked any more.

A run is compared with the earlier run of the same versions; where there is none, against the earlier runs of `check`, else
against the newest version of the earlier matrix. A finding is gone only where its check was asked again and passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from numerics_suite.core.records import CheckResult
from numerics_suite.reports.documents import Documents
from numerics_suite.reports.view.places import CheckCell, Places, Source, places_of

Key = tuple[str, ...]
"""Check, subject, task, precision, attention. Not the device: results of two machines are held against each other."""

GONE = "not in these results"
"""Why an answer that there was is no longer asked, where nothing says more."""

Turned = Literal["new", "still", "fixed", "accepted", "broken", "unasked"]
"""`broken` could not be carried out any more, `unasked` is skipped or gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One answer whose verdict is to be told.

    Attributes:
        label: of the run that says so, empty where there is one.
        now: as it is, None where the run does not have it.
        before: as it was, None where it was not asked.
        reason: why it is not asked any more.
    """

    kind: Turned
    label: str
    now: CheckResult | None
    before: CheckResult | None
    reason: str = ""

    @property
    def told(self) -> CheckResult:
        """The newer of the two."""
        found = self.now or self.before
        assert found is not None
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Against:
    """Everything that changed.

    Attributes:
        turns: answers, in the order of the new results.
        packages: name, version before and version now, of packages that are not the same; for runs of `check`.
    """

    places: Places
    turns: tuple[Turn, ...]
    packages: tuple[tuple[str, str, str], ...]

    def of(self, kind: Turned) -> tuple[Turn, ...]:
        """The turns of one kind."""
        return tuple(turn for turn in self.turns if turn.kind == kind)


def against(new: Documents, old: Documents | None) -> Against:
    """Hold new results against earlier ones.

    Args:
        new: to report.
        old: the earlier ones; with None everything is new.
    """
    places = places_of(new)
    if old is None:
        return Against(places=places, turns=tuple(_all_new(places)), packages=())
    before = places_of(old)
    turns: list[Turn] = []
    for news, olds in _pairs(places, before):
        turns += _turns(news, _by_key(olds))
    packages = tuple(_packages(places.sources, before.sources))
    return Against(places=places, turns=tuple(turns), packages=packages)


def _all_new(places: Places) -> Iterator[Turn]:
    for place in places.all:
        turn = _turn(place, None)
        if turn is not None:
            yield turn


def _pairs(new: Places, old: Places) -> Iterator[tuple[list[Source], list[Source]]]:
    """New sources, and the earlier ones that they are held against together."""
    by_versions: dict[Key, list[Source]] = {}
    for source in old.sources:
        by_versions.setdefault(_versions(source), []).append(source)
    told = [
        source for source in old.sources if source.run is not None or (source.cell is not None and source.cell.rows)
    ]
    otherwise = [source for source in old.sources if source.cell is None] or told[-1:]
    groups: dict[tuple[int, ...], tuple[list[Source], list[Source]]] = {}
    for source in new.sources:
        olds = by_versions.get(_versions(source), otherwise)
        groups.setdefault(tuple(map(id, olds)), ([], olds))[0].append(source)
    yield from groups.values()


def _versions(source: Source) -> Key:
    """transformers, torch and Python's minor version; without what a build adds to its version."""
    if source.cell is not None:
        held = source.cell.held
        found = [held.transformers, held.torch, held.python]
    else:
        environment = source.run.result.environment if source.run is not None else {}
        packages = environment.get("packages", {})
        found = [packages.get("transformers"), packages.get("torch"), environment.get("python")]
    plain = [str(version or "").partition("+")[0] for version in found]
    return (*plain[:2], ".".join(plain[2].split(".")[:2]))


def _key(result: CheckResult) -> Key:
    cell = result.cell
    return result.check, cell.subject, cell.task, cell.precision, cell.attn


def _by_key(sources: Iterable[Source]) -> dict[Key, CheckResult]:
    """The earlier answers; where several runs have one, a failure counts."""
    found: dict[Key, CheckResult] = {}
    for source in sources:
        for result in source.results:
            known = found.get(_key(result))
            if known is None or known.status != "failed":
                found[_key(result)] = result
    return found


def _turns(news: Sequence[Source], before: Mapping[Key, CheckResult]) -> Iterator[Turn]:
    answered: set[Key] = set()
    for source in news:
        for result in source.results:
            answered.add(_key(result))
            turn = _turn(CheckCell(source=source, result=result), before.get(_key(result)))
            if turn is not None:
                yield turn
    for key, earlier in before.items():
        if key in answered or earlier.status == "skipped":
            continue
        ran = [source for source in news if source.run is None and _ran(source, key)]
        if ran and earlier.status in {"failed", "error"}:
            yield Turn(kind="fixed", label=ran[-1].label, now=None, before=earlier)
        elif not ran:
            yield Turn(kind="unasked", label="", now=None, before=earlier, reason=GONE)


def _ran(source: Source, key: Key) -> bool:
    """A summary names what did not pass, and which subjects ran at which precisions."""
    rows = source.cell.rows if source.cell is not None else ()
    return any((row.subject, row.task, row.precision) == key[1:4] for row in rows)


def _turn(place: CheckCell, before: CheckResult | None) -> Turn | None:
    now, was = place.result, None if before is None else before.status
    kind: Turned | None = None
    reason = ""
    if now.status == "failed":
        kind = "still" if was == "failed" and _cause(before) == _cause(now) else "new"
    elif now.status == "passed":
        kind = "fixed" if was in {"failed", "error"} else None
    elif now.status == "accepted":
        kind = "accepted" if was != "accepted" else None
    elif now.status == "error":
        kind = "broken" if was != "error" else None
    elif was in {"failed", "passed", "accepted"}:
        kind, reason = "unasked", now.reason or GONE
    if kind is None:
        return None
    return Turn(kind=kind, label=place.source.label, now=now, before=before, reason=reason)


def _cause(result: CheckResult | None) -> str | None:
    return None if result is None or result.finding is None else result.finding.cause


def _packages(new: Sequence[Source], old: Sequence[Source]) -> Iterator[tuple[str, str, str]]:
    """Packages of the runs of `check`, where each side has one version of them."""
    held = [_held(source for source in sources if source.cell is None) for sources in (new, old)]
    for name in sorted(
        held[0].keys() & held[1].keys(), key=lambda name: (name != "transformers", name != "torch", name)
    ):
        now, before = held[0][name], held[1][name]
        if len(now) == len(before) == 1 and now != before:
            yield name, min(before), min(now)


def _held(sources: Iterable[Source]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for source in sources:
        environment: Mapping[str, Any] = source.run.result.environment if source.run is not None else {}
        facts = {"python": environment.get("python"), "device": environment.get("device")}
        for name, version in {**facts, **environment.get("packages", {})}.items():
            if version is not None:
                found.setdefault(str(name), set()).add(str(version))
    return found
