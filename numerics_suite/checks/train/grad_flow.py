"""train.grad-flow."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Batch, Measurement
from numerics_suite.core.registry import check
from numerics_suite.devices import random_state
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.runner import Runner
from numerics_suite.engine.training_loop import TRAJECTORY
from numerics_suite.inputs.strategies import training_batch
from numerics_suite.observations.roundoff import rms

LAYER = re.compile(r"\.\d+\.")
"""The number of a layer in a name."""

STEP = 1e-6
"""Relative change of a weight: code that only ranks by it picks the same, code that computes with it differs."""

FLAT = 1e-13
"""Change of the loss, relative to it: some hundred roundings of float64, a ten-millionth of the step."""

TOKENS = 8
"""Tokens of a row that lets every parameter matter: queries see several keys, and most positions have a label."""

OPTIONAL = frozenset({"mask_emb", "seg_embed", "r_s_bias"})
"""XLNet's parameters that only segment ids and the target mapping of its pretraining reach."""


@check(trains=True, reads=(TRAJECTORY,))
def grad_flow(context: CellContext) -> Iterable[Measurement]:
    """Does every trained parameter receive a gradient that is not exactly zero?"""
    run = context.trajectory
    if not run.gradient_norms or (run.bad is not None and run.bad.step == 1 and run.bad.kind != "parameter"):
        reason = "the first backward pass was not finite (train.finite)"
        raise NotApplicableError(reason)
    dead = dead_parameters(context)
    absent = tuple(name for name in dead if name in run.absent)
    underflowed = dead and not absent and context.recipe.computes_in == "float16"
    yield Measurement(
        name="dead",
        value=len(dead),
        unit="parameters",
        module=dead[0].rpartition(".")[0] if dead else None,
        parameters=dead,
        step=1 if dead else None,
        cause="underflow" if underflowed and _alive_in_fp32(context, dead) else None,
        facts={"without any gradient": len(absent), "exactly zero": len(dead) - len(absent)} if dead else {},
    )


def dead_parameters(context: CellContext) -> tuple[str, ...]:
    """Names of the trained parameters whose gradient at the first step is absent or exactly zero, except by design.

    Args:
        context: the cell.
    """
    return context.cached(_dead)


def _dead(context: CellContext) -> tuple[str, ...]:
    run = context.trajectory
    dead = [name for name in run.dead if not _unused(context, name)]
    apart = _apart(context, [name for name in dead if name in run.absent])
    apart |= _without_part_in_the_batch(context, [name for name in dead if name not in run.absent])
    return tuple(name for name in dead if name not in apart)


def _unused(context: CellContext, name: str) -> bool:
    """Whether the loss cannot reach the parameter by definition.

    An expert that no token was routed to; LoRA's A while B is still zero; the output layer that 2024's chatglm keeps
    beside its classification head.
    """
    parts = set(name.split("."))
    beside_head = context.subject.task != "causal-lm" and parts & set(context.family.lm_head_names)
    return "experts" in parts or "lora_A" in parts or bool(beside_head)


def _apart(context: CellContext, absent: Sequence[str]) -> frozenset[str]:
    """Those of the parameters without any gradient that the loss does not depend on by design.

    A pooler that a language model does not use, an indexer that only picks the keys to attend to, the vision part in a
    batch of text, a fixed sinusoid. All of these are whole parts of a model, in every layer or in none, and the loss
    stays what it is when their weights are moved. One layer's part alone, one parameter of a part that learns, and a
    norm, an attention or a feed-forward part are mistakes, whatever the loss says.
    """
    if not absent:
        return frozenset()
    modules = dict(context.model.named_modules())
    fixed = {name for name in absent if "sinusoid" in type(modules[name.rpartition(".")[0]]).__name__.lower()}
    reached = {name for name, p in context.model.named_parameters() if p.requires_grad} - set(absent)
    layers = {LAYER.sub(".N.", name) for name in reached}
    whole = [name for name in absent if name.rpartition(".")[2] in OPTIONAL]
    for name in absent:
        part = _whole_part(name, reached)
        kind = context.family.kind_of(type(modules[part]).__name__) if part else None
        if part and kind is None and LAYER.sub(".N.", name) not in layers:
            whole.append(name)
    return frozenset(fixed | (set(whole) if loss_is_flat(context, whole) else set()))


def _without_part_in_the_batch(context: CellContext, zero: Sequence[str]) -> frozenset[str]:
    """Parameters whose gradient is exactly zero on this batch but not on another one.

    Where the loss reads the first position alone, its attention has one key, whose softmax is 1 whatever the scores are: the
    true gradient of queries and keys is exactly zero. It is not over rows of several tokens in which every label counts.
    """
    if not zero or not context.takes_ids:
        return frozenset()
    here = _true_gradients(context, context.training_batch)
    unmoved = [name for name in zero if _is_zero(here.get(name))]
    if not unmoved:
        return frozenset()
    rows = training_batch(
        context.space, rows=context.rows, length=min(TOKENS, context.longest), seed=context.request.seed
    )
    elsewhere = _true_gradients(context, rows)
    return frozenset(name for name in unmoved if not _is_zero(elsewhere.get(name)))


def _true_gradients(context: CellContext, batch: Batch) -> Mapping[str, Tensor]:
    with random_state.torch_seeded(context.request.seed):  # a caught step may be in training mode
        return context.runner.true_fp64(batch.tensors, gradients=True).gradients or {}


def _is_zero(gradient: Tensor | None) -> bool:
    return gradient is None or not bool(gradient.any())


def _whole_part(name: str, reached: Iterable[str]) -> str:
    """The largest module around the parameter in which no parameter has a gradient, "" where there is none."""
    parts = name.split(".")[:-1]
    for count in range(1, len(parts) + 1):
        part = ".".join(parts[:count])
        if not any(other.startswith(f"{part}.") for other in reached):
            return part
    return ""


def loss_is_flat(context: CellContext, names: Sequence[str]) -> bool:
    """Whether the true fp64 loss is the same once the parameters are moved, by a millionth of their size.

    Args:
        context: whose model is copied.
        names: of the parameters.
    """
    if not names:
        return True
    model = context.copy_model(own=lambda copied: [copied.get_parameter(name) for name in names])
    for name in names:
        moved = model.get_parameter(name)
        moved.data = moved.data.double()  # what it is moved by is less than its dtype's spacing
    runner = Runner(model, context.condition)
    tensors, seed = context.training_batch.tensors, context.request.seed
    with random_state.torch_seeded(seed):  # a caught step may be in training mode: both runs drop the same
        before = runner.true_fp64(tensors).outputs.get("loss")
    with random_state.torch_seeded(seed):
        for name in names:
            parameter = model.get_parameter(name).data
            parameter += STEP * (rms(parameter) or 1.0) * torch.randn_like(parameter)
    with random_state.torch_seeded(seed):
        after = runner.true_fp64(tensors).outputs.get("loss")
    return (
        before is not None and after is not None and float((after - before).abs()) <= FLAT * max(abs(float(before)), 1)
    )


def _alive_in_fp32(context: CellContext, dead: tuple[str, ...]) -> bool:
    """Whether the same parameters do get a gradient in fp32, so that it was lost to float16's range."""
    from numerics_suite.devices.precisions import PRECISIONS
    from numerics_suite.engine.training_loop import train

    model = context.load(seed=context.request.seed, dtype="float32").model
    run = train(
        model,
        context.training_batch.tensors,
        condition=replace(context.condition, precision=PRECISIONS["fp32"]),
        plan=context.with_plan(steps=1),
    )
    return not set(dead) & set(run.dead)
