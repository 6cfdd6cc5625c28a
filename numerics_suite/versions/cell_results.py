"""From the files of a finished job to the record of its cell."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.json_text import read_json_text
from numerics_suite.core.versions import Failure, MatrixCell, Ran, Versions
from numerics_suite.reports.results import from_json
from numerics_suite.versions.job import BASELINE, LOG, RESULTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numerics_suite.core.records import CheckResult, RunResult

VERDICTS: dict[str, Literal["pass", "fail", "error"] | None] = {
    "passed": "pass",
    "failed": "fail",
    "error": "error",
    "unsupported": None,
}


def read_run(folder: Path) -> RunResult:
    """The results file of a finished job.

    Raises:
        BadInputError: it is torn or of another schema.
    """
    path = folder / RESULTS
    try:
        return from_json(read_json_text(path))
    except (OSError, ValueError) as error:
        message = f"{path} cannot be read: {error}; delete its folder and run again"
        raise BadInputError(message) from None


def cell_of(
    wanted: Versions, filled: Versions, done: Mapping[str, Any], folder: Path, *, reused: bool = False
) -> MatrixCell:
    """The cell of a finished job."""
    run = read_run(folder) if done["results"] else None
    reason = done["reason"]
    if reason and done["status"] == "error" and not done.get("bad_input") and (folder / LOG).is_file():
        reason = f"{reason} (log: {folder / LOG})"
    return MatrixCell(
        wanted=wanted,
        held=_held(filled, done.get("held") or {}),
        status=done["status"],
        verdict=VERDICTS[done["status"]],
        reason=reason,
        results=folder / RESULTS if run is not None else None,
        baseline=folder / BASELINE if done.get("baseline") else None,
        duration_s=done.get("duration_s", 0.0),
        reused=reused,
        rows=rows_of(run.checks) if run is not None else (),
        failures=tuple(failure_of(check) for check in run.checks if check.status in {"failed", "error"}) if run else (),
        unsupported=done.get("unsupported") or {},
        bad_input=bool(done.get("bad_input")),
    )


def _held(filled: Versions, held: Mapping[str, str]) -> Versions:
    """The versions as the process saw them; a build's own suffix (`+cpu`) stays away."""

    def public(name: str, version: str | None) -> str | None:
        seen = held.get(name)
        return version if seen is None or (version or "").startswith("git-") else seen.partition("+")[0]

    python = minor_of(held["python"]) if "python" in held else filled.python and minor_of(filled.python)
    others = tuple((name, public(name, version) or version) for name, version in filled.others)
    return Versions(
        transformers=public("transformers", filled.transformers),
        torch=public("torch", filled.torch),
        python=python,
        others=others,
    )


def minor_of(python: str) -> str:
    """`3.11` of `3.11.7`; another name of an interpreter as it is."""
    found = re.match(r"\d+\.\d+", python)
    return found[0] if found else python


def rows_of(checks: Sequence[CheckResult]) -> tuple[Ran, ...]:
    """How many checks of each subject and precision had each status."""
    counted: dict[tuple[str, str, str], Counter[str]] = {}
    for check in checks:
        key = (check.cell.subject, check.cell.task, check.cell.precision)
        counted.setdefault(key, Counter())[check.status] += 1
    return tuple(
        Ran(
            subject=subject,
            task=task,
            precision=precision,
            passed=count["passed"] + count["accepted"],
            failed=count["failed"],
            errors=count["error"],
            skipped=count["skipped"],
        )
        for (subject, task, precision), count in counted.items()
    )


def failure_of(check: CheckResult) -> Failure:
    """A check that did not pass, in short."""
    finding = check.finding
    return Failure(
        check=check.check,
        subject=check.cell.subject,
        task=check.cell.task,
        precision=check.cell.precision,
        attn=check.cell.attn,
        status=check.status,
        cause=finding.cause if finding else None,
        module=finding.module if finding else None,
        title=finding.title if finding else check.reason or "",
    )
