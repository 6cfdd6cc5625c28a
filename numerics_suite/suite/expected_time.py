"""How long will a check take? From the plan, a table of what checks run, and the speed of the device.

A check is a number of forward passes of the batch of its kind, in the cell's precision and in float64 (a backward pass is two).
`check_costs.json` has these numbers, counted by `tools/measure_costs.py`; nothing in it was timed. A pass costs its products,
`2 · weights · tokens` floating operations, the calls of its ops, and in float64 the widening of every weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from numerics_suite.core.machine import core_count
from numerics_suite.devices.precisions import precision
from numerics_suite.subjects.memory import (
    SMALL_COPY,
    bytes_read_anew,
    compared_sets,
    gradient_sets_that_fit,
    layer_count,
    product_weights,
)
from numerics_suite.suite.effort import effort_of, trained_shape

if TYPE_CHECKING:
    from numerics_suite.core.records import Cell, Subject
    from numerics_suite.devices.speed import Speed
    from numerics_suite.settings.tree import Settings
    from numerics_suite.suite.planning import Question, SuitePlan

OPS_OF_A_BLOCK = 60
"""Ops of one block of a forward pass, and as many around all blocks: 130 to 160 were counted in the passes of the six fixtures of two blocks."""

BESIDES_OPS = 6.0
"""Time of an op within a check over that of a small op that is only watched: the references widen and round what goes in and comes out,
and batches are drawn, digested and compared. Measured over a whole cell of a tiny model, where calls are nearly all there is."""

BESIDES_PRODUCTS = 1.9
"""Time of a check over that of its products alone: norms, activations, attention, roundings of the rounded run, comparisons, and
products of other shapes than the one that is timed. 1.9 was measured over a whole cell of 28 million parameters (bf16, sdpa), 2.1 of 4 million."""

UNKNOWN = {
    "ops": [4.0, 1.0, 0.0],
    "narrow": [2.0, 0.5, 0.0],
    "wide": [2.0, 0.5, 0.0],
    "planned": [4.0, 2.0, 2.0],
    "kept": [2.0, 2.0, 0.0],
}
"""For a check of another package: about what a law costs."""

OF_GRADIENTS = frozenset({"reference.gradient", "train.accumulation", "train.checkpointing", "train.trainer"})
"""Checks that end at once where the model's gradients do not fit in memory."""

READ_BYTES_PER_S = 1e9
"""At which a pass reads the weights of a model that is larger than memory from disk; 1.0 to 1.5 GB/s were measured on one SSD."""

LOADING_S = 3e-9
"""Seconds of loading one parameter: reading, poisoning and digesting it, and comparing it with its file."""

LOADING_READS = 4
"""Times that this reads weights that do not stay in memory: the digest, the search for NaN, and `load.complete` model and file."""

COUNTED_STEPS = 5
"""Steps of the training run that a `planned` row of `check_costs.json` has in it."""


@cache
def _costs() -> Mapping[str, Mapping[str, Sequence[float]]]:
    content: dict[str, dict[str, list[float]]] = json.loads(
        Path(__file__).with_name("check_costs.json").read_text(encoding="utf-8")
    )
    return content


def costs_of(check: str) -> Mapping[str, Sequence[float]]:
    """The row of a check in `check_costs.json`.

    Args:
        check: its id.
    """
    return _costs().get(check, UNKNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """Seconds of one forward pass.

    Attributes:
        ops: of its calls.
        narrow: of its products in the cell's precision.
        wide: in float64, with the weights made float64 first.
    """

    ops: float
    narrow: float
    wide: float


def pass_seconds(subject: Subject, cell: Cell, tokens: int, speed: Speed) -> Pass:
    """What one forward pass of a cell over so many tokens costs."""
    work = BESIDES_PRODUCTS * 2.0 * product_weights(subject) * tokens
    recipe = precision(cell.precision)
    reading = bytes_read_anew(subject, recipe.parameters, cell.device) / READ_BYTES_PER_S
    return Pass(
        ops=BESIDES_OPS * OPS_OF_A_BLOCK * (layer_count(subject) + 1) * speed.op_s,
        narrow=reading + work / speed.products[recipe.computes_in],
        wide=reading + work / speed.products["float64"] + (subject.parameters or 0) * speed.widening_s,
    )


def dtypes_of(plan: SuitePlan) -> tuple[str, ...]:
    """Dtypes in which a plan's cells compute products."""
    return ("float64", *dict.fromkeys(precision(cell.precision).computes_in for cell in plan.cells))


def expected_seconds(plan: SuitePlan, settings: Settings, speed: Speed) -> dict[str, float]:
    """Seconds that each question is expected to take in a process of its own, by id; 0 for one that is skipped."""
    one_pass = cache(lambda cell, tokens: pass_seconds(plan.subjects[cell.subject], cell, tokens, speed))
    begun: set[Cell] = set()
    found = {}
    without = {cell for cell in plan.cells if _lacks_room(plan.subjects[cell.subject], cell)}
    for question in plan.questions:
        refused = question.cell in without and question.check in OF_GRADIENTS
        if question.skip is not None or question.error is not None or refused:
            found[question.id] = 0.0
            continue
        subject = plan.subjects[question.cell.subject]
        parameters = subject.parameters or 0
        one = one_pass(question.cell, tokens_of(question, settings, parameters))
        seconds = check_seconds(question, one, settings, parameters)
        if question.cell not in begun:
            begun.add(question.cell)
            read = bytes_read_anew(subject, precision(question.cell.precision).parameters, question.cell.device)
            seconds += LOADING_S * parameters + LOADING_READS * read / READ_BYTES_PER_S
        found[question.id] = seconds
    return found


def _lacks_room(subject: Subject, cell: Cell) -> bool:
    """Whether gradients of the model do not even fit in memory in its own dtype."""
    dtype = precision(cell.precision).parameters
    large = subject.parameters is not None and 8 * subject.parameters > SMALL_COPY
    return large and gradient_sets_that_fit(subject, dtype, cell.device) < compared_sets(dtype)


def check_seconds(question: Question, one: Pass, settings: Settings, parameters: int = 0) -> float:
    """Seconds of one question that is not skipped; `--effort` plans its batches by the model's parameters."""
    costs, plan = costs_of(question.check), effort_of(settings).plan(parameters)
    trained = math.prod(trained_shape(settings, parameters)) / (settings.batch_size * settings.seq_len)
    counts = []
    for kind, planned in zip(("ops", "narrow", "wide"), costs["planned"], strict=True):
        fixed, example, step = costs[kind]
        if plan.drawn:
            # A planned batch is half as long as the longest that is drawn, and as long as those are on average.
            count = fixed + plan.batches * example + settings.steps * (1.0 if kind == "ops" else trained) * step
        else:
            count = planned + (settings.steps - COUNTED_STEPS) * step
        counts.append(max(count, 0.0))
    return counts[0] * one.ops + counts[1] * one.narrow + counts[2] * one.wide


def tokens_of(question: Question, settings: Settings, parameters: int) -> int:
    """Tokens of the batch in whose passes a check is counted: the longest drawn one, or where every batch is planned that of the check's kind.

    Args:
        question: of a check.
        settings: of the run.
        parameters: of the model.
    """
    plan, training = effort_of(settings).plan(parameters), trained_shape(settings, parameters)
    if plan.drawn or plan.planned is None:
        return settings.batch_size * settings.seq_len
    if question.group == "reference" or question.check in OF_GRADIENTS:
        return math.prod(plan.gradient or training)
    return math.prod(training if question.group == "train" else plan.planned)


def run_seconds(expected: Mapping[str, float], workers: int) -> float:
    """Seconds of the whole run. Workers share the cores, so what one core does takes as many cores as there are."""
    return sum(expected.values()) / max(1, min(workers, core_count()))
