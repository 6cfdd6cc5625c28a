"""The findings and the summary as plain text, for pytest's own report, in letters that standard output can say."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from numerics_suite.reports.findings import block
from numerics_suite.reports.lines import sayable
from numerics_suite.reports.summary import summary
from numerics_suite.reports.view.cards import card_of
from numerics_suite.reports.view.places import CheckCell, Source

if TYPE_CHECKING:
    from numerics_suite.core.records import CheckResult, RunResult


def finding_text(result: CheckResult, *, diagnosed: bool = True) -> str:
    """The block of one result's finding."""
    card = card_of(CheckCell(source=Source(label="", run=None), result=result), diagnosed=diagnosed)
    return "\n".join(sayable(line.text, sys.__stdout__) for line in block(card))


def summary_lines(run: RunResult, *, verbose: bool = False) -> list[str]:
    """Everything that the terminal shows at the end of a run."""
    return [sayable(line.text, sys.__stdout__) for line in summary(run, verbose=verbose)]
