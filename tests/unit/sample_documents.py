"""Everything that a report may tell of, with numbers that are not finite and texts that no format expects."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from unit.sample_run import evidence, finding, result, sample_run

from numerics_suite.core.records import CheckResult, Finding, Remedy, RunResult
from numerics_suite.core.versions import Change, Failure, MatrixCell, MatrixResult, Ran, Versions
from numerics_suite.reports.documents import BisectFile, CheckRun, ComparisonFile, Documents, Matrix

HOSTILE = (
    "`tick` ``two`` | pipe \\| <script>alert(1)</script> ]]> --> <!-- @octocat #1 ::error::x %0A\r\nnext\x00\x1b[31m \ud800 "
    "\ufffe \u202e & $x$ *b* _i_ [l](javascript:x) ~~s~~ é 中"
)
"""Markup of every format, a mention, a workflow command, line ends, and characters that XML and UTF-8 have no place for."""


def hostile_finding(title: str = f"title {HOSTILE}", **changes: Any) -> Finding:
    return finding(
        "overflow",
        title,
        **{
            "module": f"model.{HOSTILE}",
            "op": HOSTILE,
            "source": "modeling_glm4.py:123",
            "parameters": (HOSTILE,),
            "evidence": evidence("non-finite", math.nan, -math.inf, HOSTILE, **{HOSTILE: math.inf, "text": HOSTILE}),
            "batch": {"drawn": HOSTILE, "input_ids": {"dtype": "int64", "shape": [1], "values": [HOSTILE]}},
            "remedies": (Remedy(name="init-head", description=HOSTILE, verified=True, effect=HOSTILE),),
            "reproducer": f".numerics/{HOSTILE}.py",
            **changes,
        },
    )


def hostile_run() -> RunResult:
    """The sample run, with more of what is hard to write."""
    failed = result(
        "train.finite",
        "fp16",
        status="failed",
        measurements={"non-finite": math.nan, HOSTILE: math.inf, "last-loss": -math.inf},
        finding=hostile_finding(),
    )
    named = replace(failed, cell=replace(failed.cell, subject=HOSTILE, precision="bf16"))
    more = (
        failed,
        named,
        result("train.amp", "bf16", status="error", reason=HOSTILE, measurements={"x": math.nan}),
        result("train.labels", "bf16", status="skipped", reason=HOSTILE),
        result("train.clip", "fp32", status="accepted", reason=HOSTILE, finding=hostile_finding()),
    )
    run = sample_run()
    facts = {**run.environment, "platform": HOSTILE, "packages": {**run.environment["packages"], HOSTILE: HOSTILE}}
    return replace(
        run, checks=(*run.checks, *more), notes=(*run.notes, HOSTILE), environment=facts, duration_s=math.nan
    )


def run_of(*checks: CheckResult, **changes: Any) -> RunResult:
    """A run of these answers, with the verdict that follows from them."""
    statuses = {check.status for check in checks}
    verdict = "fail" if "failed" in statuses else "error" if "error" in statuses else "pass"
    exits = {"fail": 1, "error": 3, "pass": 0}
    return sample_run(**{"checks": checks, "notes": (), "verdict": verdict, "exit_status": exits[verdict], **changes})


def uninitialised(version: str, **changes: Any) -> CheckResult:
    """What a head that nobody initialises gives."""
    return result(
        "load.head-init",
        "bf16",
        "sdpa",
        "failed",
        measurements={"uninitialised": 1.0},
        finding=finding(
            "uninitialised-parameters",
            f"no code initialised score.weight of {version}",
            module="score",
            source="modeling_glm4.py:123",
            parameters=("score.weight",),
            evidence=evidence("uninitialised", 1.0, 0, "parameters"),
            remedies=(
                Remedy(name="init-head", description="initialise the head by hand", verified=True, effect="finite"),
                Remedy(name="newer-version", description="install a transformers release without the defect"),
            ),
            **changes,
        ),
    )


RELEASES = ("5.7.0", "5.8.0", "5.8.1", "5.9.0", "5.10.0")
BROKEN = ("5.8.0", "5.8.1")


def matrix_document(releases: tuple[str, ...] = RELEASES, broken: tuple[str, ...] = BROKEN) -> Matrix:
    """A matrix with a regression in it; the last cell but one has no results file, one more could not be made."""
    cells, runs = [], []
    for release in releases:
        bad = release in broken
        answer = (
            uninitialised(release)
            if bad
            else result("load.head-init", "bf16", "sdpa", measurements={"uninitialised": 0.0})
        )
        checks = (answer, result("forward.finite", "bf16", "sdpa", measurements={"non-finite": 0}))
        environment = {"python": "3.11.7", "device": "cpu", "packages": {"torch": "2.13.0", "transformers": release}}
        run = run_of(*checks, environment=environment)
        failure = Failure(
            check=answer.check,
            subject=answer.cell.subject,
            task=answer.cell.task,
            precision="bf16",
            attn="sdpa",
            status="failed",
            cause="uninitialised-parameters",
            module="score",
            title="no code initialised score.weight",
        )
        change = Change(
            against="5.7.0",
            subject=answer.cell.subject,
            task=answer.cell.task,
            precision="bf16",
            attn="sdpa",
            kind="contract",
            module="score",
            details=("initialisation of score.weight",),
        )
        held = Versions(transformers=release, torch="2.13.0", python="3.11")
        cells.append(
            MatrixCell(
                wanted=held,
                held=held,
                status="failed" if bad else "passed",
                verdict=run.verdict,
                results=Path(f"{release}/results.json"),
                rows=(Ran(subject=answer.cell.subject, task=answer.cell.task, precision="bf16", passed=1 if bad else 2, failed=int(bad), errors=0, skipped=0),),
                failures=(failure,) if bad else (),
                changes=(change,) if release in broken[:1] else (),
            )
        )  # fmt: skip
        runs.append(CheckRun(label=held.text, result=run))
    lost = Versions(transformers="5.11.0", torch="2.13.0", python="3.11")
    cells.append(
        MatrixCell(wanted=lost, held=lost, status="error", verdict="error", reason=f"no wheel of it {HOSTILE}")
    )
    return Matrix(result=MatrixResult(cells=tuple(cells), folder=Path("m"), notes=()), runs=(*runs, None))


def comparison_document() -> ComparisonFile:
    """Two baselines, with every kind of difference."""
    kinds = ("missing", "changed", "worse", "contract", "new", "better", "rounding", "identical")
    subjects = [
        {
            "subject": f"glm-{kind}" if kind != "changed" else HOSTILE,
            "task": "causal-lm",
            "precision": "bf16",
            "attn": "sdpa",
            "device": "cpu",
            "kind": kind,
            "module": "model.layers.0" if kind in {"changed", "worse"} else None,
            "error_ratio": {"worse": math.inf, "better": math.nan, "changed": 1.0}.get(kind),
            "details": {"why": [f"error-ratio Infinity {HOSTILE}"]} if kind in {"changed", "worse"} else {},
        }
        for kind in kinds
    ]
    return ComparisonFile(content={"command": "compare", "old": "old", "new": "new", "subjects": subjects})


def bisect_document() -> BisectFile:
    """A search that found 5.8.0."""
    found = uninitialised("5.8.0").finding
    content = {
        "command": "bisect", "what": "transformers", "subject": "glm4-tiny", "last_good": "5.7.0", "first_bad": "5.8.0",
        "between": [], "check": "load.head-init", "deciding": ["load.head-init"], "kind": "failed", "candidates": 4,
        "tested": [{"version": "5.8.0", "verdict": "bad", "duration_s": math.nan, "reason": None, "reused": False}],
        "show": f"numerics-suite matrix x --transformers 5.7.0,5.8.0 {HOSTILE}", "notes": [], "duration_s": math.nan,
    }  # fmt: skip
    return BisectFile(content=content, finding=found)


def everything() -> Documents:
    """All of it."""
    return Documents(
        runs=(CheckRun(label="hostile", result=hostile_run()),),
        matrices=(matrix_document(),),
        comparisons=(comparison_document(),),
        bisections=(bisect_document(),),
        notes=(f"a note {HOSTILE}",),
    )
