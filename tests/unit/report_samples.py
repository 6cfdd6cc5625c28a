"""What reports are made of in tests: a matrix with the 5.8 regression, a run of 5,000 cells, one where all is well."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from unit.sample_run import sample_run

from numerics_suite.core.records import Cell, CheckResult, Finding, Remedy, RunResult, Series, SubjectFacts
from numerics_suite.core.registry import check_ids
from numerics_suite.core.rehearsal import Advice, Rehearsal, RehearsedRun
from numerics_suite.core.versions import Change, Failure, MatrixCell, MatrixResult, Ran, Versions
from numerics_suite.judgement.budgets import budgets_of
from numerics_suite.reports.documents import BisectFile, CheckRun, ComparisonFile, Documents, Matrix

VERSIONS = (
    "5.6.2", "5.7.0", "5.8.0", "5.8.1", "5.9.0", "5.10.4", "5.11.0", "5.12.1", "5.13.1", "5.14.1", "5.15.1", "5.16.1",
    "5.17.0", "5.18.0", "5.19.0", "5.20.2", "5.21.1", "5.22.2", "5.23.0", "5.24.0",
)  # fmt: skip
BAD = ("5.8.0", "5.8.1")
TASK = "sequence-classification"
HOSTILE = "</script><img src=x onerror=alert(1)>\u2028\u202e\ud800&\"'"


def modules(layers: int) -> list[tuple[str, str, float]]:
    """Names, roles and limits of the modules of a model."""
    found = [("model.embed_tokens", "embedding", 0.0), ("model.rotary_emb", "rotary", 0.6)]
    parts = (
        ("input_layernorm", "norm", 0.75),
        ("self_attn.q_proj", "linear", 1.05),
        ("self_attn.o_proj", "linear", 1.05),
    )
    parts += (
        ("post_attention_layernorm", "norm", 0.75),
        ("mlp.gate_up_proj", "linear", 1.05),
        ("mlp.down_proj", "linear", 1.05),
    )
    for layer in range(layers):
        found += [(f"model.layers.{layer}.{name}", role, limit) for name, role, limit in parts]
    return [*found, ("model.norm", "norm", 0.75), ("score", "linear", 1.05)]


def by_module(name: str, layers: int, shift: float = 0.0) -> Series:
    table = modules(layers)
    size = {"embedding": 0.0, "rotary": 0.36, "norm": 0.6, "linear": 0.43}
    values = tuple(
        (size[role] + shift + 0.01 * (at % 5) if role != "embedding" else 0.0)
        if name == "error"
        else 15.5 - 0.1 * at / max(layers, 1) - 8 * shift
        for at, (_, role, _) in enumerate(table)
    )
    return Series(
        name=name,
        unit="roundoffs" if name == "error" else "bits",
        along="module",
        at=tuple(module for module, _, _ in table),
        values=values,
        groups=tuple(role for _, role, _ in table),
        limits=tuple(limit for _, _, limit in table) if name == "error" else (),
    )


def over_steps(name: str, *values: float) -> Series:
    return Series(name=name, unit="nats", along="step", at=tuple(range(1, len(values) + 1)), values=values)


def series_of(check: str, layers: int, shift: float = 0.0, bad: bool = False) -> tuple[Series, ...]:
    if check == "reference.local":
        return (by_module("error", layers, shift),)
    if check == "forward.headroom":
        return (by_module("bits", layers, shift),)
    if check == "train.finite" and bad:
        return (over_steps("loss", math.nan),)
    if check == "train.finite":
        losses = tuple(1.65 * 0.93**step + shift for step in range(6))
        return over_steps("loss", *losses), over_steps("gradient-norm", *(2.5 * loss for loss in losses[:-1]))
    return ()


def measured(check: str, shift: float = 0.0) -> dict[str, float]:
    return {name: round(budget.limit * (0.6 + shift), 6) for name, budget in budgets_of(check).items()}


def uninitialised(check: str, subject: str) -> Finding:
    titles = {
        "load.head-init": "never initialised: score.weight",
        "forward.finite": "outputs hold NaN or infinite elements (2)",
        "train.finite": "training is not finite from step 1 on",
    }
    return Finding(
        cause="uninitialised-parameters",
        title=titles[check],
        explanation="Nobody wrote to this memory: with uninitialised memory filled with NaN the weights come out NaN.",
        module="score",
        parameters=("score.weight",),
        step=1 if check == "train.finite" else None,
        evidence={
            "measurement": "uninitialised",
            "measured": math.nan,
            "allowed": 0,
            "unit": "parameters",
            "seen in": subject,
        },
        remedies=(
            Remedy(
                name="init-head",
                description="initialise the head by hand: xavier_uniform_ for its weight, zeros for its bias",
                verified=True,
                effect="finite; loss 1.65 → 1.09 in 5 steps",
            ),
            Remedy(name="newer-version", description="install another transformers", verified=None),
        ),
    )


def facts(subject: str, source: str | None = None) -> SubjectFacts:
    return SubjectFacts(
        id=subject,
        source=source or f"fixture:{subject}",
        revision=None,
        family="glm4",
        model_class="Glm4ForSequenceClassification",
        task=TASK,
        parameters=209_728,
        stored_dtype="bfloat16",
        digest="sha256:340ed8cf",
    )


def run_of(checks: list[CheckResult], subjects: tuple[str, ...], version: str = "5.24.0") -> RunResult:
    verdict = "fail" if any(check.status == "failed" for check in checks) else "pass"
    packages = {"torch": "2.13.0", "transformers": version}
    return replace(
        sample_run(),
        verdict=verdict,
        checks=tuple(checks),
        notes=(),
        exit_status=int(verdict == "fail"),
        subjects=tuple(facts(subject) for subject in subjects),
        environment={"python": "3.11.7", "platform": "Linux", "device": "cpu", "packages": packages},
    )


def cell(subject: str, precision: str, attn: str = "sdpa", device: str = "cpu") -> Cell:
    return Cell(subject=subject, precision=precision, attn=attn, device=device, task=TASK)


def matrix_cell(version: str, run: RunResult, changes: tuple[Change, ...] = ()) -> MatrixCell:
    held = Versions(transformers=version, torch="2.13.0", python="3.11")
    keys = dict.fromkeys((check.cell.subject, check.cell.precision) for check in run.checks)
    rows = []
    for subject, precision in keys:
        statuses = [
            item.status for item in run.checks if (item.cell.subject, item.cell.precision) == (subject, precision)
        ]
        counts = {name: statuses.count(name) for name in ("passed", "failed", "skipped")}
        rows.append(Ran(subject=subject, task=TASK, precision=precision, errors=statuses.count("error"), **counts))
    failures = tuple(
        Failure(
            check=item.check,
            subject=item.cell.subject,
            task=TASK,
            precision=item.cell.precision,
            attn=item.cell.attn,
            status=item.status,
            cause=item.finding.cause,
            module=item.finding.module,
            title=item.finding.title,
        )
        for item in run.checks
        if item.status == "failed" and item.finding is not None
    )
    return MatrixCell(
        wanted=held,
        held=held,
        status="failed" if failures else "passed",
        verdict=run.verdict,
        results=Path(f"cells/{version}/results.json"),
        baseline=Path(f"cells/{version}/baseline"),
        duration_s=12.5,
        rows=tuple(rows),
        failures=failures,
        changes=changes,
    )


def changes_in(version: str, before: str, subjects: tuple[str, ...]) -> tuple[Change, ...]:
    told = {
        "5.8.0": (
            ("changed", "score", "true-answers nan in score, 1e-10 allowed"),
            ("contract", None, "head.score.weight.initialised: True → False"),
        ),
        "5.9.0": (
            ("changed", "score", "true-answers nan in score, 1e-10 allowed"),
            ("contract", None, "head.score.weight.initialised: False → True"),
        ),
        "5.23.0": (("rounding", None, "other bits in cached"),),
    }
    return tuple(
        Change(
            against=before,
            subject=subject,
            task=TASK,
            precision="bf16",
            attn="sdpa",
            kind=kind,
            module=module,
            details=(detail,),
        )
        for kind, module, detail in told.get(version, ())
        for subject in subjects
    )


def regression(*, with_runs: bool = True) -> Documents:
    """A matrix over 20 versions of which two leave a new head uninitialised, in two subjects."""
    subjects, checks = (
        ("glm-tiny", "glm4-tiny"),
        ("load.head-init", "forward.finite", "forward.headroom", "reference.local", "train.finite"),
    )
    cells, runs = [], []
    for before, version in zip(("", *VERSIONS), VERSIONS, strict=False):
        results = []
        for subject in subjects:
            for check in checks:
                bad = version in BAD and check in {"load.head-init", "forward.finite", "train.finite"}
                given: dict[str, Any] = {"status": "passed", "measurements": measured(check)}
                if version in BAD:
                    given = {"status": "skipped", "reason": "weights are not finite (load.head-init)"}
                if bad:
                    given = {
                        "status": "failed",
                        "measurements": {"uninitialised": math.nan},
                        "finding": uninitialised(check, subject),
                    }
                series = series_of(check, 3, bad=bad) if bad or version not in BAD else ()
                results.append(CheckResult(check=check, cell=cell(subject, "bf16"), series=series, **given))
        run = run_of(results, subjects, version)
        cells.append(matrix_cell(version, run, changes_in(version, before, subjects)))
        runs.append(CheckRun(label=f"transformers {version}", result=run) if with_runs else None)
    result = MatrixResult(cells=tuple(cells), folder=Path(".numerics/matrix"), duration_s=812.0)
    return Documents(matrices=(Matrix(result=result, runs=tuple(runs)),))


def many_cells(versions: int = 20, cells: int = 5000) -> Documents:
    """So many cells with every check each, findings by the hundred, and series of a model of 40 layers."""
    subjects = tuple(f"checkpoint-{number:02}" for number in range(25))
    rows, runs = [], []
    shared = {(check, shift): series_of(check, 40, shift / 100) for check in check_ids() for shift in range(25)}
    names = [f"5.{4 + number}.0" for number in range(versions)]
    each = cells // versions // len(subjects)
    kinds = [
        (precision, attn)
        for precision in ("bf16", "fp16", "fp32", "amp-bf16", "pure-fp16")
        for attn in ("eager", "sdpa")
    ]
    for at, version in enumerate(names):
        results = []
        for number, subject in enumerate(subjects):
            for index in range(each):
                precision, attn = kinds[index % len(kinds)]
                device = "cpu" if index < len(kinds) else f"cuda:{index // len(kinds)}"
                where = cell(subject, precision, attn, device)
                for order, check in enumerate(check_ids()):
                    results.append(big_result(check, where, (at, number, index, order), shared))
        run = run_of(results, subjects, version)
        runs.append(CheckRun(label=f"transformers {version}", result=run, path=Path(f"cells/{version}/results.json")))
        rows.append(matrix_cell(version, run))
    if versions == 1:
        return Documents(runs=tuple(runs))
    return Documents(matrices=(Matrix(result=MatrixResult(cells=tuple(rows), folder=Path("cells")), runs=tuple(runs)),))


def large() -> Documents:
    """Enough for rows to be joined, cells to be left out and tables to stay text; drawn in a fraction of the time."""
    return many_cells(cells=500)


def big_result(
    check: str, where: Cell, at: tuple[int, int, int, int], shared: dict[tuple[str, int], tuple[Series, ...]]
) -> CheckResult:
    version, number, index, order = at
    turn = version * 7919 + number * 104_729 + index * 1299 + order * 31
    if turn % 11 == 0:
        return CheckResult(check=check, cell=where, status="skipped", reason=f"{where.precision} has no {check}")
    series = shared[check, number]
    if turn % 97 or not budgets_of(check):
        return CheckResult(
            check=check, cell=where, status="passed", measurements=measured(check, number / 100), series=series
        )
    budget = next(iter(budgets_of(check).values()))
    module = f"model.layers.{turn % 40}.mlp.expert_{'abcdefgh'[turn % 8]}"
    finding = Finding(
        cause=budget.cause,
        title=f"{module} errs {turn % 13 + 2} times as much as it may",
        explanation=budget.reason,
        module=module,
        op="aten.mm.default",
        source="modeling_glm4.py:123",
        evidence={
            "measurement": budget.measurement,
            "measured": budget.limit + turn % 13 + 2,
            "allowed": budget.limit,
            "unit": "roundoffs",
        },
        remedies=tuple(
            Remedy(name=name, description="as its name says", verified=[True, None, False][turn % 3])
            for name in budget.remedies[:2]
        ),
    )
    return CheckResult(
        check=check,
        cell=where,
        status="failed",
        measurements={budget.measurement: budget.limit + 2},
        finding=finding,
        series=series,
    )


def all_green() -> Documents:
    """One run in which every check passed."""
    results = [
        CheckResult(
            check=check,
            cell=cell("glm4-tiny", precision, attn),
            status="passed",
            measurements=measured(check),
            series=series_of(check, 3),
        )
        for precision in ("bf16", "fp32")
        for attn in ("eager", "sdpa")
        for check in check_ids()
    ]
    return Documents(runs=(CheckRun(label="green", result=run_of(results, ("glm4-tiny",))),))


def hostile() -> Documents:
    """A run in which every text tries to leave its place."""
    finding = Finding(
        cause=HOSTILE,
        title=HOSTILE,
        explanation=HOSTILE,
        module=HOSTILE,
        op=HOSTILE,
        source=HOSTILE,
        parameters=(HOSTILE,),
        evidence={HOSTILE: HOSTILE, "measured": math.nan, "allowed": math.inf},
        batch={"drawn": HOSTILE},
        remedies=(Remedy(name=HOSTILE, description=HOSTILE, verified=True, effect=HOSTILE),),
        reproducer=HOSTILE,
    )
    where = Cell(subject=HOSTILE, precision=HOSTILE, attn=HOSTILE, device=HOSTILE, task=TASK)
    series = (
        Series(
            name="error",
            unit=HOSTILE,
            along="module",
            at=(HOSTILE,),
            values=(math.nan,),
            groups=(HOSTILE,),
            limits=(1.0,),
        ),
        Series(name="loss", unit="nats", along="step", at=(1, 2), values=(1.0, math.inf)),
    )
    checks = [
        CheckResult(
            check=check,
            cell=where,
            status=status,
            reason=HOSTILE,
            finding=finding if status == "failed" else None,
            series=series,
            measurements={HOSTILE: math.inf},
        )
        for check, status in (
            ("reference.local", "failed"),
            ("train.finite", "passed"),
            (HOSTILE, "error"),
            ("load.tied", "skipped"),
        )
    ]
    run = replace(
        run_of(checks, ()),
        notes=(HOSTILE,),
        subjects=(facts(HOSTILE, HOSTILE),),
        environment={"python": HOSTILE, "packages": {HOSTILE: HOSTILE}},
        settings={HOSTILE: HOSTILE, "names": [HOSTILE], "origins": {}},
    )
    return Documents(runs=(CheckRun(label=HOSTILE, result=run),), notes=(HOSTILE,))


def comparison() -> ComparisonFile:
    base = {"task": TASK, "attn": "sdpa", "device": "cpu"}
    worse = {
        "all_kinds": ["worse", "rounding"],
        "why": ["local 1.42 in model.layers.1.mlp, 1.1 allowed"],
        "error_before": 0.012,
        "error_now": math.inf,
        "headroom_change": -1.5,
        "bits_differ": ["logits"],
        "local_errors": [
            {"module": f"model.layers.{layer}.mlp", "before": 1.0, "now": 1.0 + 0.4 * layer, "ratio": 1.0 + 0.4 * layer}
            for layer in range(4)
        ],
    }
    subjects = [
        {
            **base,
            "subject": "glm4-tiny",
            "precision": "bf16",
            "kind": "worse",
            "module": "model.layers.1.mlp",
            "error_ratio": 1.42,
            "details": worse,
        },
        {
            **base,
            "subject": "glm4-tiny",
            "precision": "fp32",
            "kind": "identical",
            "module": None,
            "error_ratio": None,
            "details": {},
        },
    ]
    return ComparisonFile(
        content={"command": "compare", "old": "baselines/5.7.0", "new": "baselines/5.8.0", "subjects": subjects}
    )


def bisection() -> BisectFile:
    tested = [
        {"version": version, "verdict": verdict, "duration_s": 31.2, "reason": None, "reused": False}
        for version, verdict in (
            ("5.5.4", "good"),
            ("5.24.0", "bad"),
            ("5.12.1", "bad"),
            ("5.7.0", "good"),
            ("5.8.0", "bad"),
        )
    ]
    content = {
        "command": "bisect",
        "what": "transformers",
        "subject": "glm4-tiny",
        "last_good": "5.7.0",
        "first_bad": "5.8.0",
        "between": ["5.7.1"],
        "tested": tested,
        "check": "load.head-init",
        "show": "numerics-suite matrix fixture:glm4-tiny --transformers 5.8.0 --checks load.head-init",
        "candidates": 21,
        "notes": [],
    }
    return BisectFile(content=content, finding=uninitialised("load.head-init", "glm4-tiny"))


def rehearsal() -> Rehearsal:
    def run(precision: str, *losses: float, stopped: str = "") -> RehearsedRun:
        return RehearsedRun(
            precision=precision,
            largest_logit=2.5,
            losses=losses,
            gradient_norms=tuple(2 * loss for loss in losses[:-1]),
            clipped_losses=losses,
            scales=(65536.0, 32768.0) if precision == "amp-fp16" else (),
            skipped=1,
            stopped=stopped,
            stopped_clipped="",
            largest_stable_lr=None if stopped else 1e-3,
            at_least=True,
        )

    return Rehearsal(
        subject="glm4-tiny",
        task=TASK,
        attn="sdpa",
        device="cpu",
        batch="16 of your texts",
        optimizer="adamw",
        lr=1e-4,
        steps=3,
        chance=0.693,
        runs=(
            run("bf16", 0.7, 0.6, 0.5),
            run("amp-fp16", 0.7, 0.61, 0.52),
            run("pure-fp16", 0.7, math.nan, stopped="loss at step 2"),
        ),
        recipe=(Advice(setting="precision", value="bf16", because="the loss falls as fast as in fp32"),),
    )


def everything() -> Documents:
    """Every kind of document at once."""
    matrix = regression()
    run = replace(sample_run(), rehearsals=(rehearsal(),))
    return Documents(
        runs=(CheckRun(label="nightly", result=run),),
        matrices=matrix.matrices,
        comparisons=(comparison(),),
        bisections=(bisection(),),
        notes=("5.3.0: cells/gone.json is gone, so only its summary in matrix.json is told",),
    )
