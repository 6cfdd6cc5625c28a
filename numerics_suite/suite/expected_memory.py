"""How much memory will a cell take? From the plan, the sizes of the model and a table of what checks keep.

At its peak a cell holds its process, the weights that are not mapped, the answers that checks share, and the work of the one check that
takes most. What it holds is counted; of another device than the CPU only what lies there. Mapped weights count nothing: the
system drops their pages where it needs room.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from numerics_suite.core.registry import get_check
from numerics_suite.devices.kinds import CPU, kind_of, parts_of
from numerics_suite.devices.precisions import precision
from numerics_suite.engine.training_loop import TRAJECTORY
from numerics_suite.subjects.memory import (
    KEPT_BYTES,
    SMALL_COPY,
    block_parameters,
    compared_sets,
    gradient_sets_that_fit,
    head_parameters,
    held_bytes,
    sizes_of,
    training_bytes,
    width_of,
)
from numerics_suite.suite.effort import effort_of, trained_shape
from numerics_suite.suite.expected_time import costs_of

if TYPE_CHECKING:
    from numerics_suite.core.records import Cell, Subject
    from numerics_suite.devices.precisions import Precision
    from numerics_suite.inputs.effort import BatchPlan
    from numerics_suite.settings.tree import Settings
    from numerics_suite.subjects.memory import Sizes

PROCESS_BYTES = 300_000_000
"""Of a process that has imported torch and transformers and loaded a mapped model: 280 to 292 MB were measured, and what Python makes of a few batches."""

KERNELS_OF_A_BATCH, KERNEL_BYTES = 15, 650_000
"""Products in 16 bits that a batch and what laws make of it bring, and what oneDNN takes to compile one: it does so for each shape of rows
and weight, and keeps 1,024 of them. 1,000 took 650 MB; the ten batches of a tiny bfloat16 cell take 98 MB more than those of a float32 one."""

HIDDEN_STATES, INTERMEDIATE_STATES, LOGITS, SERVED_LOGITS = 18, 5, 7, 5
"""Tensors in float64 that a backward pass of the true fp64 run keeps at its peak: hidden-sized and intermediate-sized ones of
each block, and logits-sized ones of the loss (fewer where no loss is differentiated). Counted on a device that accounts for every byte, over seven shapes of GLM-4
(2 to 12 blocks, hidden size 64 to 512, 500 to 20,000 words, 4 to 16 heads) in two precisions and two attentions: the sum below
is within 6 % of the peak on all of them."""

KEPT_BATCHES = 2.85
"""Batches as large as the training batch whose answers each store keeps for one that Hypothesis draws, up to :data:`KEPT_BYTES`."""

PLANNED = 2
"""Planned batches over which `check_costs.json` counts the answers that are kept."""

PARTS = frozenset({"train.accumulation", "train.checkpointing"})
"""Checks that sum gradients of micro-batches: those of the last part are there before any of the first, so the sum is a whole set."""


def trains(cell: Cell, asked: Collection[str]) -> bool:
    """Whether the cell's precision trains and one of these checks reads a training run."""
    return precision(cell.precision).trains and any(TRAJECTORY in get_check(check).reads for check in asked)


def cell_bytes(subject: Subject, cell: Cell, settings: Settings, *, asked: Collection[str], scope: str) -> int | None:
    """Expected bytes on its device at the peak of one cell, in a run of its own; None where the number of parameters is unknown.

    Args:
        subject: resolved.
        cell: of the subject.
        settings: of the run.
        asked: ids of its checks that are not skipped.
        scope: what is trained.
    """
    if subject.parameters is None:
        return None
    recipe, plan = precision(cell.precision), effort_of(settings).plan(subject.parameters)
    shape, on_cpu = trained_shape(settings, subject.parameters), kind_of(parts_of(cell.device)[0]) == CPU
    held = held_bytes(subject, recipe.parameters, cell.device)
    runs = any(any(costs_of(check)[kind]) for check in asked for kind in ("narrow", "wide"))
    forward = 0
    if runs:  # a large model is widened in pieces of 8 MB
        forward = _forward_bytes(subject, plan.planned or shape, 0 if _streams(subject) else 8 * subject.parameters)
    if on_cpu and "forward.attention" in asked:
        forward += held  # of the same weights loaded once more: the allocator keeps what it gave for them until a gradient is done
    compared = plan.gradient or shape
    gradients = _gradient_bytes(subject, recipe, cell.device, compared, asked)
    # The definition widens a weight whole; families that have one hold gate and up in one.
    oracle = 0
    if "reference.oracle" in asked:
        oracle = _forward_bytes(subject, compared, 16 * (sizes := sizes_of(subject)).inner * sizes.hidden)
    training = 0
    if trains(cell, asked):
        training = training_bytes(subject, recipe.parameters, scope, batch=shape[0], seq=shape[1])
    stores = _kept_bytes(subject, recipe, plan, settings.batch_size * settings.seq_len, asked)
    kept = sum(stores if on_cpu else stores[2:])
    process = PROCESS_BYTES + runs * _kernel_bytes(recipe, plan) if on_cpu else 0
    return process + held + kept + max(forward, oracle, gradients, training)


def _kernel_bytes(recipe: Precision, plan: BatchPlan) -> int:
    return KERNEL_BYTES * KERNELS_OF_A_BATCH * plan.batches if width_of(recipe.computes_in) == 2 else 0


def _kept_bytes(
    subject: Subject, recipe: Precision, plan: BatchPlan, drawn_tokens: int, asked: Collection[str]
) -> list[int]:
    """Of the answers that checks share: in true fp64, of other passes by their batch, and as the model gave them, which lie on its device."""
    sizes = sizes_of(subject)
    answer = sizes.hidden if subject.task == "sequence-classification" else sizes.words  # laws compare its states
    if plan.planned is None:
        tokens, counts = drawn_tokens, [KEPT_BATCHES * plan.batches] * 3
    else:
        tokens = math.prod(plan.planned)
        counts = [
            plan.batches / PLANNED * sum(each) for each in zip(*(costs_of(c)["kept"] for c in asked), strict=True)
        ]
    widths = (8, width_of(recipe.computes_in), width_of(recipe.computes_in))
    return [min(KEPT_BYTES, int(n * tokens * answer * width)) for n, width in zip(counts, widths, strict=False)]


def _forward_bytes(subject: Subject, shape: tuple[int, int], wide: int) -> int:
    """Of a forward pass in float64: weights that are widened, the states of a block, and answers."""
    sizes = sizes_of(subject)
    return wide + _states(sizes, shape, blocks=1) + 8 * SERVED_LOGITS * math.prod(shape) * sizes.words


def _gradient_bytes(
    subject: Subject, recipe: Precision, device: str, shape: tuple[int, int], asked: Collection[str]
) -> int:
    """Of the check that compares gradients in float64 and takes most: sets of them, and what one backward pass holds."""
    sizes, parameters = sizes_of(subject), subject.parameters or 0
    streams = _streams(subject)
    # As the checks choose: what fits is held at once, else one by one. A float64 copy of a small model, whose sets fit, is a set more.
    one, own = 8 * parameters, compared_sets(recipe.parameters)
    fitting = gradient_sets_that_fit(subject, recipe.parameters, device) if streams else math.inf
    sets = [0.0]
    if "reference.gradient" in asked and fitting >= own:
        sets.append(own + (fitting >= 1 + own))
    if PARTS & set(asked) and fitting >= 1:
        sets.append(2 if fitting >= 2 else 1)
    if "reference.oracle" in asked and fitting >= 1:
        sets.append(1)
    if not max(sets):
        return 0
    held = _states(sizes, shape, blocks=1 if streams else sizes.layers) + 8 * LOGITS * math.prod(shape) * sizes.words
    # Streamed: a part of the output layer's gradient that is added to its sum, one block in float64 and its gradients.
    held += 8 * (head_parameters(subject) + 2 * block_parameters(subject)) if streams else one
    return int(one * max(sets)) + held


def _states(sizes: Sizes, shape: tuple[int, int], *, blocks: int) -> int:
    """Bytes of what so many blocks hold in float64."""
    rows, length = shape
    tokens = rows * length
    block = tokens * (HIDDEN_STATES * sizes.hidden + INTERMEDIATE_STATES * sizes.inner) + rows * sizes.heads * length**2
    return 8 * block * blocks


def _streams(subject: Subject) -> bool:
    return 8 * (subject.parameters or 0) > SMALL_COPY
