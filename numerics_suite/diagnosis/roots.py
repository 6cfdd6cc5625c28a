"""A finding follows from an earlier one of its cell where what cures that one, at its own place, cures the check too."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.records import CheckResult, Finding, Remedy
from numerics_suite.diagnosis.consequences import NO_RUN
from numerics_suite.diagnosis.copies import discard
from numerics_suite.diagnosis.remedy_register import cures
from numerics_suite.diagnosis.remedy_trials import Ask
from numerics_suite.engine.cell_context import CellContext

AT_ITS_PLACE = frozenset(
    {
        "init-head",
        "keep-in-fp32",
        "fix-config",
        "set-pad-token",
        "fix-tokenizer",
        "cast-after-loading",
        "load-with-dtype",
    }
)
"""Remedies that change what their finding names and nothing else. Another precision, another attention or smaller steps change the
whole run: two defects may both be gone under these."""


def following(
    check: str, finding: Finding, context: CellContext, earlier: Iterable[CheckResult], ask: Ask
) -> Finding | None:
    """The finding as a consequence of an earlier one, with the remedy that cured both; None where nothing shows that."""
    for root in earlier:
        for remedy in root.finding.remedies if root.finding is not None else ():
            if remedy.verified and not remedy.together and remedy.name in AT_ITS_PLACE and remedy.name in cures():
                assert root.finding is not None
                if _cures(check, remedy.name, root.finding, context, ask):
                    shown = Remedy(
                        name=remedy.name,
                        description=remedy.description,
                        verified=True,
                        effect=f"{check} passes too, as {root.check} does",
                    )
                    others = tuple(one for one in finding.remedies if one.name != remedy.name)
                    return replace(finding, consequence_of=root.id, remedies=(shown, *others))
    return None


def _cures(check: str, name: str, root: Finding, context: CellContext, ask: Ask) -> bool:
    """Whether the check passes under the root's remedy, in the first way that it is applied: at the root's own place."""
    ways = cures()[name](context, root)
    try:
        attempt = next(ways, None)
        if attempt is None:
            return False
        try:
            return not ask(check, attempt.context).breaches
        finally:
            discard(attempt.context)
    except (NumericsSuiteError, *NO_RUN):
        return False
    finally:
        ways.close()  # type: ignore[attr-defined]  # a copy of the files lasts as long
