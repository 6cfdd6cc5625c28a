"""A run with everything in it that a printer may meet: findings, copies, NaN, an error, skips, accepted findings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from numerics_suite.core.records import Cell, CheckResult, Finding, Remedy, RunResult, Series, SubjectFacts
from numerics_suite.settings.options import from_command_line
from numerics_suite.settings.tree import to_json

SUBJECT = "glm4-tiny-classifier"


def result(check: str, precision: str, attn: str = "eager", status: str = "passed", **fields: Any) -> CheckResult:
    cell = Cell(subject=SUBJECT, precision=precision, attn=attn, device="cpu", task="sequence-classification")
    return CheckResult(check=check, cell=cell, status=status, duration_s=0.25, **fields)


def finding(cause: str, title: str, **fields: Any) -> Finding:
    explanation = (
        "A value that is not finite spreads to the loss, to every gradient and, with the first optimizer step, to "
        "every parameter."
    )
    return Finding(**{"cause": cause, "title": title, "explanation": explanation, **fields})


def evidence(name: str, measured: float, allowed: float, unit: str, **facts: Any) -> dict[str, Any]:
    return {"measurement": name, "measured": measured, "allowed": allowed, "unit": unit, **facts}


def over_steps(name: str, unit: str, *values: float) -> Series:
    return Series(name=name, unit=unit, along="step", at=tuple(range(1, len(values) + 1)), values=values)


def by_module(name: str, unit: str, values: dict[str, float], **fields: Any) -> Series:
    return Series(name=name, unit=unit, along="module", at=tuple(values), values=tuple(values.values()), **fields)


def failing_checks() -> list[CheckResult]:
    overflow = [
        result(
            "forward.finite",
            precision,
            attn,
            "failed",
            measurements={"non-finite": count, "examples": 10},
            finding=finding(
                "overflow",
                f"{count} output elements are NaN or infinite",
                module="model.layers.3.mlp",
                op="aten.mul.Tensor",
                source="modeling_glm4.py:123",
                evidence=evidence(
                    "non-finite",
                    count,
                    0,
                    "elements",
                    **{"largest finite input": 41000.0, "share not finite": math.nan},
                ),
                batch={
                    "drawn": "padding=left lengths=[1, 3]",
                    "input_ids": {"dtype": "int64", "shape": [2, 3], "values": [[0, 0, 17], [5, 255, 1]]},
                    "attention_mask": {"dtype": "int64", "shape": [2, 3], "values": [[0, 0, 1], [1, 1, 1]]},
                },
                remedies=(
                    Remedy(name="keep-in-fp32", description="keep this module in float32 and cast its result"),
                    Remedy(
                        name="use-amp-bf16",
                        description="use bfloat16, whose range is float32's (amp-bf16)",
                        verified=True,
                        effect="0 elements",
                    ),
                    Remedy(name="eager-attention", description='load with attn_implementation="eager"', verified=False),
                ),
            ),
        )
        for precision, attn, count in (("fp16", "eager", 4), ("fp16", "sdpa", 6), ("amp-fp16", "eager", 2))
    ]
    uninitialised = [
        result(
            "load.head-init",
            precision,
            attn,
            "failed",
            measurements={"uninitialised": math.inf},
            finding=finding(
                "uninitialised-parameters",
                "no code initialised score.weight [red]not a tag[/red] \x1b[31m",
                parameters=tuple(f"score.{index}.weight" for index in range(7)),
                evidence=evidence("uninitialised", math.inf, 0, "parameters"),
                reproducer="out dir/reproduce.py",
            ),
        )
        for precision in ("fp32", "fp16", "bf16", "amp-fp16")
        for attn in ("eager", "sdpa")
    ]
    return [
        *uninitialised,
        *overflow,
        result(
            "train.finite",
            "pure-fp16",
            "sdpa",
            "failed",
            measurements={"non-finite": math.nan, "last-loss": -math.inf},
            finding=finding(
                "optimizer-underflow",
                "training is not finite from step 2 on",
                step=2,
                parameters=("score.weight",),
                evidence=evidence("non-finite", math.nan, 0, "tensors", losses="0.69, NaN", first="loss loss"),
            ),
            series=(over_steps("loss", "nats", 0.6931, math.nan), over_steps("gradient-norm", "norm", 8123.5)),
        ),
    ]


def sample_run(**changes: Any) -> RunResult:
    settings = from_command_line(
        {"subjects": ["./my checkpoint"], "names": [SUBJECT], "seed": "7", "task": "sequence-classification"},
        Path(Path.cwd().anchor),  # a project's own settings have no part in the sample
    )
    checks = [
        result("load.config", "fp32", measurements={"ignored": 0}),
        *failing_checks(),
        result("forward.headroom", "bf16", measurements={"non-finite": 0, "bits": 120.0}),
        result(
            "forward.headroom",
            "fp16",
            "sdpa",
            measurements={"non-finite": 0, "bits": 1.4912},
            series=(
                by_module(
                    "bits",
                    "bits",
                    {"model.norm": 9.5, "model.layers.3.mlp": 1.4912, "score": math.inf},
                    groups=("norm", "mlp", "linear"),
                ),
            ),
        ),
        result("forward.padding", "fp16", status="error", reason="out of memory: 3.20 GiB asked, 1048576 bytes free"),
        result(
            "train.clip",
            "bf16",
            status="accepted",
            reason="known since 5.8",
            measurements={"excess": 0.5},
            finding=finding("divergence", "clipping leaves the gradient norm above its limit"),
        ),
        *(
            result(
                check, "fp16", attn, "skipped", reason="fp16 is for serving: training in it is pure-fp16 or amp-fp16"
            )
            for check in ("train.amp", "train.descends", "train.clip", "train.labels")
            for attn in ("eager", "sdpa")
        ),
    ]
    facts = {
        "command": "check",
        "started_at": "2026-06-01T12:00:00+00:00",
        "duration_s": 41.234,
        "verdict": "fail",
        "environment": {
            "python": "3.11.7",
            "platform": "Linux",
            "device": "cpu",
            "packages": {"torch": "2.13.0", "transformers": "5.24.0"},
        },
        "settings": to_json(settings),
        "subjects": (
            SubjectFacts(
                id=SUBJECT,
                source="./my checkpoint",
                revision=None,
                family="glm4",
                model_class="Glm4ForSequenceClassification",
                task="sequence-classification",
                parameters=160768,
                stored_dtype="bfloat16",
                digest="sha256:00",
            ),
        ),
        "checks": tuple(checks),
        "notes": ("accept entry (check=load.tied) matched no finding of this run: remove it",),
        "exit_status": 1,
    }
    return RunResult(**{**facts, **changes})
