"""The two remedies that are another release: the failing checks are asked again in environments of the newest and of the nearest.

`newer-version` is verified by a release under which the same check of the same cell passes: the newest first, then the
nearest above the installed one. `pin-version` looks below, nearest first, where the newer ones did not help.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from packaging.version import Version

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.records import CheckResult, Finding, Remedy, RunResult
from numerics_suite.core.registry import own_check_ids
from numerics_suite.diagnosis.remedy_register import useful_first
from numerics_suite.settings.tree import Settings
from numerics_suite.versions.cell_results import read_run
from numerics_suite.versions.extensions import WHY
from numerics_suite.versions.fingerprints import know_all
from numerics_suite.versions.index import released
from numerics_suite.versions.job import for_a_cell
from numerics_suite.versions.matrix import Execute, MatrixPlan, answer
from numerics_suite.versions.recipes import Wanted
from numerics_suite.versions.result_store import ResultStore

NEWER, PIN = "newer-version", "pin-version"
NEAREST = 2
"""Releases tried on each side beside the newest: a repair mostly comes with the next release."""


def try_versions(
    result: RunResult, settings: Settings, kept: ResultStore, execute: Execute, tell: Callable[[str], None]
) -> RunResult:
    """The result with `newer-version` and `pin-version` tried for every finding that has them.

    Raises:
        KeyboardInterrupt: the user stopped.
    """
    ours = frozenset(own_check_ids())
    open_ids = [item.id for item in result.checks if item.check in ours and (_has(item, NEWER) or _has(item, PIN))]
    if not open_ids:
        return result
    installed = Version(str(result.environment["packages"]["transformers"]))
    trial = _ReleaseTrial(result=result, settings=settings, kept=kept, execute=execute, tell=tell)
    releases = released("transformers")
    newer = [version for version in releases if version > installed]
    older = [version for version in releases if version < installed]
    cured: dict[str, dict[str, str]] = {NEWER: {}, PIN: {}}
    seen: dict[str, list[str]] = {NEWER: [], PIN: []}
    for remedy, candidates in ((NEWER, [*newer[-1:], *newer[:NEAREST]]), (PIN, older[: -NEAREST - 1 : -1])):
        for version in dict.fromkeys(candidates):
            waiting = [key for key in open_ids if key not in cured[NEWER] and key not in cured[remedy]]
            if not waiting:
                break
            status = trial.statuses(str(version), waiting)
            seen[remedy] += [str(version)] if status else []
            cured[remedy] |= {key: str(version) for key in waiting if status.get(key) == "passed"}
    told = tuple(_with_remedies(item, cured, seen) for item in result.checks)
    if not newer:  # the newest is installed: the index says so
        told = tuple(_without(item, NEWER) for item in told)
    return replace(result, checks=told)


class _ReleaseTrial:
    """Asks checks in other environments."""

    def __init__(
        self, *, result: RunResult, settings: Settings, kept: ResultStore, execute: Execute, tell: Callable[[str], None]
    ) -> None:
        self.result, self.settings, self.kept, self.execute, self.tell = result, settings, kept, execute, tell

    def statuses(self, version: str, ids: Sequence[str]) -> Mapping[str, str]:
        """Status by id under that release; empty where it cannot run."""
        self.tell(f"trying transformers {version} on {len(ids)} failing checks")
        results = {item.id: item for item in self.result.checks}
        chosen = [results[key] for key in ids]
        # The very cells that failed, by names that `accept` entries and defaults cannot change.
        stated = for_a_cell(self.settings).stating(
            checks=tuple(dict.fromkeys(item.check for item in chosen)),
            precision=tuple(dict.fromkeys(item.cell.precision for item in chosen)),
            diagnose=False,
        )
        attn = tuple(dict.fromkeys(item.cell.attn for item in chosen)) if _named(chosen) else self.settings.attn
        settings = replace(stated, skip=(), attn=attn, accept=())
        try:
            plan = MatrixPlan(
                settings=settings, known=know_all(self.settings), cells=(), cwd=Path.cwd(), threads=1, record=False
            )
            job = plan.job(Wanted(transformers=version))
            done, folder, _ = answer(job, self.kept, self.execute, lambda _: None)
            if not done["results"]:
                return {}
            return {item.id: item.status for item in read_run(folder).checks}
        except NumericsSuiteError as error:
            self.tell(f"transformers {version} cannot be tried: {error}")
            return {}


def _named(chosen: Sequence[CheckResult]) -> bool:
    """Whether attention has names here; a plain module has no switch for one."""
    return all(item.cell.attn != "default" for item in chosen)


def _has(item: CheckResult, name: str) -> bool:
    return item.finding is not None and any(remedy.name == name for remedy in item.finding.remedies)


def _without(item: CheckResult, name: str) -> CheckResult:
    if item.finding is None:
        return item
    remedies = tuple(remedy for remedy in item.finding.remedies if remedy.name != name)
    return replace(item, finding=replace(item.finding, remedies=remedies))


def _with_remedies(
    item: CheckResult, cured: Mapping[str, Mapping[str, str]], seen: Mapping[str, Sequence[str]]
) -> CheckResult:
    if item.finding is None:
        return item
    finding = replace(item.finding, remedies=useful_first(_told(item.id, item.finding, cured, seen)))
    return replace(item, finding=finding)


def _told(
    key: str, finding: Finding, cured: Mapping[str, Mapping[str, str]], seen: Mapping[str, Sequence[str]]
) -> Iterator[Remedy]:
    ours = key.partition("/")[0] in own_check_ids()
    for remedy in finding.remedies:
        if remedy.name not in {NEWER, PIN}:
            yield remedy
        elif not ours:
            yield replace(remedy, effect=f"not tried: {WHY}")
        elif key in cured[remedy.name]:
            yield replace(remedy, verified=True, effect=f"passes under transformers {cured[remedy.name][key]}")
        elif seen[remedy.name]:
            tried = ", ".join(seen[remedy.name])
            yield replace(remedy, verified=False, effect=f"still fails under transformers {tried}")
        else:
            yield replace(remedy, effect="not tried: no other release to try, or a newer one cures it")
