"""The findings and the summary as plain text, for pytest's own report, in letters that standard output can say."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from numerics_suite.reports.findings import block, grouped
from numerics_suite.reports.lines import sayable
from numerics_suite.reports.summary import summary

if TYPE_CHECKING:
    from numerics_suite.core.records import CheckResult, RunResult


def finding_text(result: CheckResult) -> str:
    """The block of one result's finding.

    Args:
        result: one with a finding.
    """
    return "\n".join(sayable(line.text, sys.__stdout__) for group in grouped([result]) for line in block(group))


def summary_lines(run: RunResult) -> list[str]:
    """Everything that the terminal shows at the end of a run.

    Args:
        run: the whole run.
    """
    return [sayable(line.text, sys.__stdout__) for line in summary(run)]
