"""Asks the suite's own questions of a mutant, in this process, on one cell."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from mutants.catalogue.record import ORACLE, Mutant
from mutants.editing import Patch
from numerics_suite.core.records import Cell, CheckResult
from numerics_suite.core.registry import check_ids
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.load import Loaded, load
from numerics_suite.suite.planning import Question
from numerics_suite.suite.session import SuiteSession

PLACES = (
    "forward.deterministic",
    "forward.finite",
    "train.finite",
    ORACLE,
    "reference.local",
    "load.",
    "inputs.",
    "forward.",
    "train.",
    "reference.",
)
"""Whose word on the place counts first.

Where two runs differ every other comparison is a lottery; a NaN is traced to its op; the definition is compared module by
module; then come the others.
"""


CAUSES_FROM = (
    ("forward.deterministic", ""),
    ("train.labels", ""),
    ("", "coarser"),
    ("forward.finite", ""),
    ("load.", ""),
    ("train.finite", ""),
    ("inputs.", ""),
    ("forward.causal", "true"),
    ("forward.batch", "true"),
    ("forward.pooling", ""),
    (ORACLE, ""),
    ("reference.end-to-end", ""),
    ("reference.local", ""),
    ("train.checkpointing", ""),
    ("forward.", ""),
    ("train.", ""),
    ("reference.", ""),
)
"""Whose word on the cause counts first, by check and measurement.

Where answers change from call to call every other comparison is a lottery. Then come findings that were seen and not concluded
(a loss against its labels, an op's own dtype, the op where a NaN begins, weights, inputs). A law that is broken in true fp64 says more
than the definition, but for padding and the cache, which a wrong position breaks too. What is left are comparisons in one precision.
"""


class MutantSession(SuiteSession):
    """The suite's session over models that are changed as soon as they are loaded."""

    def __init__(self, settings: Settings, patch: Patch | None = None) -> None:
        """Without a patch it is the suite itself."""
        super().__init__(settings)
        self.findings.tries_remedies = False  # whether a defect is seen is asked here, not what cures it
        self.patch = patch

    def context(self, cell: Cell) -> CellContext:
        """The context of the cell, with the changed loader."""
        if self._context is None or self._context.cell != cell:
            subject = self.plan.subjects[cell.subject]
            self._context = CellContext(subject, cell, self._request(subject, cell), loader=self._load)
        return self._context

    def _load(self, *args: Any, **kwargs: Any) -> Loaded:
        loaded = load(*args, **kwargs)
        if self.patch is not None:
            self.patch(loaded.model)
        return loaded


def settings_of(
    fixture: str, precision: str, attn: str, checks: Iterable[str] = (), *, device: str = "cpu", **changes: Any
) -> Settings:
    """The command line's defaults for one cell of a shipped checkpoint."""
    return Settings(
        subjects=(f"fixture:{fixture}",),
        precision=(precision,),
        attn=(attn,),
        checks=tuple(checks),
        device=device,
        origins={"precision": "command line"},
        **changes,
    )


def answers(session: SuiteSession, checks: Iterable[str] | None = None) -> Iterator[CheckResult]:
    """One result per planned question, in the order of `checks` where given."""
    by_check: dict[str, Question] = {question.check: question for question in session.plan.questions}
    for check in checks or check_ids():
        if check in by_check:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # as in the suite's own run; a mutant may make torch warn
                yield session.answer(by_check[check])[0]


def run_mutant(mutant: Mutant, checks: Iterable[str] | None = None, **changes: Any) -> list[CheckResult]:
    """What the checks say of the mutant: all of them, or those named, up to the first that fails."""
    session = MutantSession(settings_of(mutant.fixture, mutant.precision, mutant.attn, **changes), mutant.apply)
    results = []
    for result in answers(session, checks):
        results.append(result)
        if checks is not None and result.status == "failed":
            break
    return results


def failures(results: Iterable[CheckResult]) -> list[CheckResult]:
    """The results that are findings."""
    return [result for result in results if result.status == "failed"]


def named_module(results: Iterable[CheckResult]) -> str | None:
    """The module that a person would go to: of the finding that knows most about places."""
    failed = failures(results)

    def rank(result: CheckResult) -> int:
        return next(index for index, prefix in enumerate(PLACES) if result.check.startswith(prefix))

    for result in sorted(failed, key=rank):
        if result.finding is not None and result.finding.module is not None:
            return result.finding.module
    return None


def named_cause(results: Iterable[CheckResult]) -> str | None:
    """The cause that a person would go by: of the finding that knows most about it."""

    def rank(result: CheckResult) -> int:
        assert result.finding is not None
        measured = str(result.finding.evidence.get("measurement", ""))
        return next(
            index
            for index, (check, name) in enumerate(CAUSES_FROM)
            if result.check.startswith(check) and (not name or name == measured)
        )

    failed = [result for result in failures(results) if result.finding is not None]
    best = min(failed, key=rank, default=None)
    return best.finding.cause if best is not None and best.finding is not None else None


def is_named(mutant: Mutant, module: str | None) -> bool:
    """Whether that is the module at fault."""
    return (
        mutant.module_pattern is not None
        and module is not None
        and re.fullmatch(mutant.module_pattern, module) is not None
    )


def describe(results: Iterable[CheckResult]) -> str:
    """One line per result for an assertion's message."""
    lines = []
    for result in results:
        found = result.finding
        said = f"{found.cause} at {found.module}: {found.title}" if found else result.reason or ""
        lines.append(f"{result.check}: {result.status} {said}")
    return "\n".join(lines)


@functools.cache
def release() -> tuple[int, ...]:
    """The installed transformers as numbers."""
    import transformers

    return tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:3])
