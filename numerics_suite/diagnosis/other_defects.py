"""Other defects of the cell: each has a finding of its own, so none counts against a remedy of another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.records import Finding
from numerics_suite.diagnosis.consequences import LACKING, NO_RUN, RAISES, UNSOUND
from numerics_suite.diagnosis.findings import finding as finding_of
from numerics_suite.diagnosis.findings import title
from numerics_suite.diagnosis.remedy_register import cures
from numerics_suite.engine.cell_context import CellContext

if TYPE_CHECKING:
    from numerics_suite.diagnosis.remedy_trials import Ask
    from numerics_suite.judgement.verdicts import Breach

LOCAL = {"load.dtype": "cast-after-loading", "load.head-init": "init-head"}
"""Checks of what a model holds before it runs, and the remedy that changes the named parameters alone; in this order."""

OF_WEIGHTS = UNSOUND | LACKING | {"bad-initialisation"}
"""Causes that lie in the values of parameters: another head is their cure."""


def without_others(check: str, finding: Finding, context: CellContext, ask: Ask) -> tuple[CellContext, tuple[str, ...]]:
    """The cell with its other defects cured, and what cured them, as `init-head (load.head-init)`.

    A defect is another one where the check fails as before once it is cured: the same measurement, told in the same words.
    Where the check then passes or fails otherwise, the defect is its cause or a part of it, and stays.
    """
    if finding.cause == RAISES:
        return context, ()
    told = []
    for other, remedy in LOCAL.items():
        same = other == check or (remedy == "init-head" and finding.cause in OF_WEIGHTS)
        cured = None if same else _cured(other, remedy, context, ask)
        if cured is not None and _fails_as_before(check, finding, cured, ask):
            context = cured
            told.append(f"{remedy} ({other})")
    return context, tuple(told)


def _cured(check: str, remedy: str, context: CellContext, ask: Ask) -> CellContext | None:
    """The cell with what the check names cured; None where it names nothing, or nothing that can be cured."""
    try:
        named = context.cached(_breaches, check, ask)
        if not named:
            return None
        attempt = next(cures()[remedy](context, finding_of(named, context, None, diagnose=False)), None)
    except (NumericsSuiteError, *NO_RUN):
        return None
    return None if attempt is None else attempt.context


def _breaches(context: CellContext, check: str, ask: Ask) -> Sequence[Breach]:
    return ask(check, context).breaches


def _fails_as_before(check: str, finding: Finding, cured: CellContext, ask: Ask) -> bool:
    try:
        left = ask(check, cured).breaches
    except (NumericsSuiteError, *NO_RUN):
        return False
    measured = finding.evidence.get("measurement")
    return bool(left) and left[0].measurement.name == measured and title(left[0]) == finding.title
