"""How a run ends: exit status and verdict from one fact, which planned questions have an answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from numerics_suite.core.records import CheckResult

MISSING = "planned, and no answer came: the worker ended, or the test was stopped"
TIME_LIMIT = "time limit"
NO_BATCH = "a plain module without a batch: let the factory return (module, batch)"
UNASKED = {TIME_LIMIT, NO_BATCH}
"""Reasons of skips that leave a question open that could have been asked; any other reason is an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The end of a run, as CONTRACT.md defines it.

    Attributes:
        status: the exit status.
        verdict: `error` wherever the run did not come to its end.
        complete: it came to its end, so every planned question has an entry.
    """

    status: int
    verdict: Literal["pass", "fail", "error"]
    complete: bool


def ending(
    results: Sequence[CheckResult], *, interrupted: bool = False, allow_partial: bool = False, broken: bool = False
) -> Ending:
    """The end of a run with these results.

    Args:
        results: one for each planned question; of an interrupted run, those that have an answer.
        interrupted: Ctrl-C or SIGTERM.
        allow_partial: what a time limit left out does not count.
        broken: an accept entry matched nothing or is past its date, or a subject of the baselines was left out.
    """
    if interrupted:
        return Ending(status=2, verdict="error", complete=False)
    statuses = {result.status for result in results}
    if "failed" in statuses or broken:
        return Ending(status=1, verdict="fail", complete=True)
    if "error" in statuses:
        bad_input = all(result.bad_input for result in results if result.status == "error")
        return Ending(status=4 if bad_input else 3, verdict="error", complete=True)
    unasked = {result.reason for result in results if result.status == "skipped" and result.reason in UNASKED}
    if allow_partial:
        unasked -= {TIME_LIMIT}
    nothing = not statuses & {"passed", "accepted"}
    return Ending(status=5 if nothing or unasked else 0, verdict="pass", complete=True)
