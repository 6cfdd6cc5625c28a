"""Records of `matrix` and `bisect`: versions, what each cell said, and what changed between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from numerics_suite.core.records import Finding

CellStatus = Literal["passed", "failed", "error", "unsupported"]
"""`unsupported`: no check can run on these versions, such as for a family that they lack."""

StepVerdict = Literal["good", "bad", "untestable"]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Versions:
    """What one environment holds; None is whatever the environments choose by themselves.

    Attributes:
        others: name and version of other packages that somebody chose, by name.
    """

    transformers: str | None = None
    torch: str | None = None
    python: str | None = None
    others: tuple[tuple[str, str], ...] = ()

    @property
    def named(self) -> Mapping[str, str]:
        """The versions by package, without those that were not chosen."""
        own = {"transformers": self.transformers, "torch": self.torch, "python": self.python, **dict(self.others)}
        return {name: version for name, version in own.items() if version}

    @property
    def text(self) -> str:
        """`transformers 5.8.0, torch 2.7.0, python 3.11`, without those that were not chosen."""
        return ", ".join(f"{name} {version}" for name, version in self.named.items()) or "the current environment"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One way in which one cell of a baseline differs from another's.

    Attributes:
        against: the other version (`5.7.0`, `torch 2.6.0`, `python 3.10`), or `baseline`.
        kind: any of CONTRACT.md's but `identical`.
        module: the first that differs, None where that is not known.
        details: what differs, a line each.
    """

    against: str
    subject: str
    task: str
    precision: str
    attn: str
    kind: str
    module: str | None = None
    details: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A check that did not pass, in short; the cell's results file has the rest."""

    check: str
    subject: str
    task: str
    precision: str
    attn: str
    status: str
    cause: str | None = None
    module: str | None = None
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One subject at one precision, and whether every check that ran passed."""

    subject: str
    task: str
    precision: str
    passed: int
    failed: int
    errors: int
    skipped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixCell:
    """What `check` said in one environment.

    Attributes:
        held: as the environment really holds; as planned where it was not made.
        verdict: of the results file, `error` where there is none because something broke, None where nothing could be asked.
        reason: one line, for a cell without results.
        results: path of the results file, None without one.
        baseline: folder of the baselines recorded with it, None without.
        duration_s: of the process, seconds.
        reused: an earlier run's.
        unsupported: reason by subject that these versions cannot build.
        changes: against earlier versions and the baseline.
        bad_input: the reason speaks of what the user gave, not of these versions.
    """

    wanted: Versions = field(metadata={"json": ""})
    held: Versions = field(metadata={"json": ""})
    status: CellStatus
    verdict: Literal["pass", "fail", "error"] | None = None
    reason: str | None = None
    results: Path | None = None
    baseline: Path | None = None
    duration_s: float = 0.0
    reused: bool = False
    rows: tuple[Ran, ...] = ()
    failures: tuple[Failure, ...] = ()
    unsupported: Mapping[str, str] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    bad_input: bool = False

    def of(self, subject: str, task: str, precision: str) -> tuple[CellStatus, list[Failure], list[Change]]:
        """The status of one row that ran, its failures and its changes."""
        row = (subject, task, precision)
        failures = [one for one in self.failures if (one.subject, one.task, one.precision) == row]
        changes = [one for one in self.changes if (one.subject, one.task, one.precision) == row]
        failed = any(one.status == "failed" for one in failures)
        return "failed" if failed else "error" if failures else "passed", failures, changes

    def with_changes(self, changes: tuple[Change, ...]) -> MatrixCell:
        """The cell with what changed."""
        return replace(self, changes=changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixResult:
    """All cells, oldest first; each with its changes."""

    cells: tuple[MatrixCell, ...]
    folder: Path
    duration_s: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def exit_status(self) -> int:
        """The exit status of CONTRACT.md: 1 if a cell fails, else 3 if one errs, 5 where nothing ran."""
        statuses = {cell.status for cell in self.cells}
        if "failed" in statuses:
            return 1
        if "error" in statuses:
            return 3
        return 0 if "passed" in statuses else 5


@dataclass(frozen=True, slots=True, kw_only=True)
class BisectStep:
    """One version that was tried.

    Attributes:
        verdict: untestable where it cannot run.
        reason: one line for an untestable version.
        reused: an earlier run's.
    """

    version: str
    verdict: StepVerdict
    duration_s: float
    reason: str | None = None
    reused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class BisectResult:
    """The boundary.

    Attributes:
        what: a package such as `transformers`, `checkpoint`, or the folder of a clone.
        last_good: the newest version at which the deciding checks passed.
        first_bad: the oldest after it at which one failed.
        between: untestable versions between these two; the change is in one of them or in `first_bad`.
        tested: in the order in which they were tried.
        check: the check that decides, and whose finding is reported.
        deciding: all checks that decide.
        candidates: how many versions lie between the ends, these included.
    """

    what: str
    subject: str
    last_good: str
    first_bad: str
    between: tuple[str, ...]
    tested: tuple[BisectStep, ...]
    check: str
    deciding: tuple[str, ...]
    finding: Finding | None
    results: Path | None
    show: str
    candidates: int
    duration_s: float = 0.0
    notes: tuple[str, ...] = ()
