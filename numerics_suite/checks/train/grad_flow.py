"""train.grad-flow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.evidence import Evidence


@check(trains=True)
def grad_flow(evidence: Evidence) -> Iterable[Measurement]:
    """Does every trained parameter receive a gradient that is not exactly zero?"""
    run = evidence.trajectory
    if not run.gradient_norms or (run.bad is not None and run.bad.step == 1 and run.bad.kind != "parameter"):
        reason = "the first backward pass was not finite (train.finite)"
        raise NotApplicableError(reason)
    dead = tuple(name for name in run.dead if not _unused(evidence, name))
    absent = tuple(name for name in dead if name in run.absent)
    underflowed = dead and not absent and evidence.recipe.computes_in == "float16"
    yield Measurement(
        name="dead",
        value=len(dead),
        unit="parameters",
        module=dead[0].rpartition(".")[0] if dead else None,
        parameters=dead,
        step=1 if dead else None,
        cause="underflow" if underflowed and _alive_in_fp32(evidence, dead) else None,
        facts={"without any gradient": len(absent), "exactly zero": len(dead) - len(absent)} if dead else {},
    )


def _unused(evidence: Evidence, name: str) -> bool:
    """Whether the loss cannot reach the parameter by definition.

    An expert that no token was routed to; LoRA's A while B is still zero; the output layer that 2024's chatglm keeps
    beside its classification head.
    """
    parts = set(name.split("."))
    beside_head = evidence.subject.task != "causal-lm" and parts & set(evidence.family.lm_head_names)
    return "experts" in parts or "lora_A" in parts or bool(beside_head)


def _alive_in_fp32(evidence: Evidence, dead: tuple[str, ...]) -> bool:
    """Whether the same parameters do get a gradient in fp32, so that it was lost to float16's range."""
    from numerics_suite.devices.precisions import PRECISIONS
    from numerics_suite.engine.training_loop import train

    model = evidence.load(seed=evidence.request.seed, dtype="float32").model
    run = train(
        model,
        evidence.training_batch.tensors,
        condition=replace(evidence.condition, precision=PRECISIONS["fp32"]),
        plan=evidence.with_plan(steps=1),
    )
    return not set(dead) & set(run.dead)
