"""What runs inside an environment: `python -m numerics_suite.versions.cell JOB.json`.

One process, so one import of torch, runs the suite and then records baselines of the same cells beside the job's file.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.atomic import write_atomic
from numerics_suite.core.errors import BadInputError, NumericsSuiteError
from numerics_suite.core.switch import switch_off
from numerics_suite.reports.results import dump
from numerics_suite.versions.job import BASELINE, DONE, RESULTS, Job, read_job, sources_of

if TYPE_CHECKING:
    from numerics_suite.baselines.records import Recorded
    from numerics_suite.core.records import RunResult


def main(arguments: list[str]) -> int:
    """Do the job and write `done.json`, last of all."""
    end_with_parent()
    switch_off()  # the same checks in every environment, also in the running one
    path = Path(arguments[0])
    done = {"status": "error", "results": False, "baseline": False, "reason": None, "unsupported": {}, "times": {}}
    try:
        _run(read_job(path), path.parent, done)
    except BadInputError as error:
        done |= {"reason": str(error), "bad_input": True}
    except NumericsSuiteError as error:
        done["reason"] = str(error)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a cell's failure never hides the others
        import traceback

        traceback.print_exc()
        done["reason"] = _error_line(error)
    write_atomic(path.parent / DONE, dump(done))
    return 0


def _run(job: Job, folder: Path, done: dict[str, Any]) -> None:
    clock = _Clock(done["times"])
    if job.check:
        result = _check(job, done, clock)
        if result is None:
            return
        from numerics_suite.reports.results import write_results

        write_results(folder / RESULTS, result)
        done["results"] = True
        if result.verdict == "error":
            first = next(check for check in result.checks if check.status == "error")
            done["reason"] = first.reason if first.bad_input else f"{first.id}: {first.reason}"
            done["bad_input"] = result.exit_status == 4
        clock.lap("check")
    else:
        done["status"] = "passed"
    if job.record and done["status"] != "unsupported":
        try:
            done["baseline"], reason = _record(job, folder)
        except Exception as error:  # noqa: BLE001 - what the checks said stays
            reason = str(error) if isinstance(error, NumericsSuiteError) else _error_line(error)
        if reason:
            done["reason"] = f"no baseline could be recorded: {reason}"
            if done["status"] != "failed":
                done["status"] = "error"
        clock.lap("record")


def _check(job: Job, done: dict[str, Any], clock: _Clock) -> RunResult | None:
    """Run the suite; None where these versions can build none of the subjects."""
    from numerics_suite.reports.terminal import Terminal
    from numerics_suite.subjects import compat
    from numerics_suite.suite.run import run_check
    from numerics_suite.suite.run_findings import REPRODUCERS
    from numerics_suite.suite.session import SuiteSession

    clock.lap("imports")
    # Cells run side by side in the user's folder: a script of one release never takes the place of another's.
    scripts = REPRODUCERS / f"transformers-{compat.version()}"
    terminal = Terminal(stream=sys.stdout)
    try:
        result = run_check(SuiteSession(job.settings, reproducers=scripts), terminal)
    except BadInputError:
        done["unsupported"] = _unsupported(job)
        if len(done["unsupported"]) == len(sources_of(job.settings)):
            done["status"] = "unsupported"
            done["reason"] = "; ".join(dict.fromkeys(done["unsupported"].values()))
            return None
        raise
    terminal.summary(result)
    done["held"] = {**result.environment["packages"], "python": result.environment["python"]}
    done["status"] = _status(result, done)
    return result


def _status(result: RunResult, done: dict[str, Any]) -> str:
    ran = [check for check in result.checks if check.status != "skipped"]
    reasons: dict[str, list[str]] = {}
    for check in result.checks:
        reasons.setdefault(check.cell.subject, []).append("" if check.status != "skipped" else check.reason or "")
    # Every check of a subject skipped, all for one reason: these versions lack its family.
    done["unsupported"] = {name: each[0] for name, each in reasons.items() if len(set(each)) == 1 and each[0]}
    if not ran:
        done["reason"] = next((check.reason for check in result.checks if check.reason), "no check was asked")
        return "unsupported"
    return {"pass": "passed", "fail": "failed", "error": "error"}[result.verdict]


def _unsupported(job: Job) -> dict[str, str]:
    """The reason of each subject that these versions cannot build."""
    from numerics_suite.core.errors import UnsupportedError
    from numerics_suite.subjects.resolve import resolve

    settings, reasons = job.settings, {}
    for source in sources_of(settings):
        try:
            resolve(
                source,
                task=settings.task,
                num_labels=settings.num_labels,
                trust_remote_code=settings.trust_remote_code,
                allow_pickle=settings.allow_pickle,
            )
        except UnsupportedError as error:
            reasons[source] = str(error)
        except BadInputError:
            continue  # the run's own error tells
    return reasons


def _record(job: Job, folder: Path) -> tuple[bool, str]:
    """Whether there is a baseline, and the first reason for a cell of which there is none though it ran."""
    from numerics_suite.baselines.store import save
    from numerics_suite.suite.recording import record_cells
    from numerics_suite.suite.session import SuiteSession

    errors: list[str] = []

    def follow(step: Recorded) -> None:
        if step.error:
            errors.append(f"{step.cell.id}: {step.error}")

    # With the checks of baselines in its plan, so that a cell with a baseline is measured on that one's batches.
    session = SuiteSession(replace(job.settings, checks=(), skip=(), data=None))
    cells = record_cells(session, follow)
    if cells:
        save(folder / BASELINE, cells, force=True)
    return bool(cells), errors[0] if errors else ""


def _error_line(error: BaseException) -> str:
    from numerics_suite.suite.session import error_line

    return error_line(error) if isinstance(error, Exception) else f"{type(error).__name__}: {error}"


class _Clock:
    """Seconds of each part of the work."""

    def __init__(self, times: dict[str, float]) -> None:
        self._times, self._last = times, time.perf_counter()

    def lap(self, name: str) -> None:
        """The time since the last lap belongs to this part."""
        now = time.perf_counter()
        self._times[name] = round(now - self._last, 3)
        self._last = now


def end_with_parent() -> None:
    """End this process when the one that started it is gone: the pipe to standard input closes then."""
    try:
        pipe = os.dup(0)
        nowhere = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nowhere, 0)
        os.close(nowhere)
    except OSError:
        return  # no standard input to watch

    def watch() -> None:
        while os.read(pipe, 1):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
