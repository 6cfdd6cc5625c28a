"""Measures again what each check costs, in forward passes of the training batch: `numerics_suite/suite/check_costs.json`.

    python tools/measure_costs.py            counts on fixture:glm4-tiny in bfloat16 and writes the file
    python tools/measure_costs.py --show     counts and prints the table

Nothing is timed: products and ops are counted, so the file is the same on every machine. Run it after a change of what a check
runs; `tests/unit/test_expected_time.py` says when it is out of date.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from numerics_suite.engine.cell_context import CellContext
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.planning import Question
from numerics_suite.suite.session import SuiteSession

TARGET = Path(__file__).resolve().parents[1] / "numerics_suite" / "suite" / "check_costs.json"
SUBJECT, PRECISION, ATTENTION = "fixture:glm4-tiny", "bf16", "sdpa"
EXAMPLES, STEPS = (10, 4), (5, 1)
"""Two values of each option that a check's cost may depend on; between them it is taken for linear."""
KINDS = ("ops", "narrow", "wide")
ROWS, LENGTH = 4, 32
"""Of the two planned batches, and of the training batch, where these are counted."""


class Count(TorchDispatchMode):
    """Counts ops and the floating operations of products, those in float64 by themselves."""

    def __init__(self) -> None:
        """Count nothing yet."""
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count one op."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.counted["ops"] += 1
        product = flop_registry.get(func._overloadpacket)  # noqa: SLF001 - by which torch's own counter finds it
        if product is not None:
            flops = product(*args, **kwargs, out_val=out)
            wide = any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in args)
            self.counted["wide" if wide else "narrow"] += flops
        return out


def _session(**changes: Any) -> tuple[SuiteSession, CellContext]:
    settings = Settings(
        subjects=(SUBJECT,), precision=(PRECISION,), attn=(ATTENTION,), skip=("baseline.*",), device="cpu", **changes
    )
    session = SuiteSession(settings)
    return session, session.context(session.plan.cells[0])


def _one_pass(context: CellContext) -> Counter[str]:
    tensors = context.inputs_of(context.training_batch)
    with Count() as count:
        context.run(tensors)
    return count.counted


def _count_of(session: SuiteSession, question: Question) -> Counter[str]:
    with Count() as count:
        result, trace = session.answer(question)
    if result.status == "error":
        raise RuntimeError(trace)
    return count.counted


def counted(**changes: Any) -> dict[str, Counter[str]]:
    """What each check runs, by id, in the order in which one process asks them; and `forward`, one pass of the training batch."""
    session, context = _session(**changes)
    found = {"forward": _one_pass(context)}
    for question in session.plan.questions:
        found[question.check] = _count_of(session, question)
    return found


def planned() -> dict[str, dict[str, list[float]]]:
    """By check, where planned batches are all there is: ops and products, in forward passes of one; and answers that it leaves with its cell.

    Answers are counted in those of one planned batch: of true fp64 passes, of others, and as the model gave them.
    """
    session, context = _session(effort="quick", batch_size=ROWS, seq_len=LENGTH)
    words = ROWS * LENGTH * context.vocab_size
    one = _one_pass(context)
    found, before = {}, [0.0, 0.0, 0.0]
    for question in session.plan.questions:
        count = _count_of(session, question)
        forwards = sum(value.nbytes for outputs in context._forwards.values() for value in outputs.values())  # noqa: SLF001 - of the same repository
        held = [context.true_passes.answers.nbytes / 8, context.passes.nbytes / 2, forwards / 2]
        found[question.check] = {
            "planned": [round(count[kind] / one["ops" if kind == "ops" else "narrow"], 3) for kind in KINDS],
            "kept": [round((now - was) / words, 2) for now, was in zip(held, before, strict=True)],
        }
        before = held
    return found


def table() -> dict[str, dict[str, list[float]]]:
    """By check and kind of cost: what it costs always, for each example and for each step, in forward passes; and :func:`planned`."""
    full, fewer, shorter = (
        counted(max_examples=EXAMPLES[0], steps=STEPS[0]),
        counted(max_examples=EXAMPLES[1], steps=STEPS[0]),
        counted(max_examples=EXAMPLES[0], steps=STEPS[1]),
    )
    unit = {"ops": full["forward"]["ops"], "narrow": full["forward"]["narrow"], "wide": full["forward"]["narrow"]}
    rows: dict[str, dict[str, list[float]]] = {}
    by_planned = planned()
    for check in full:
        if check == "forward":
            continue
        row = {}
        for kind, one in unit.items():
            whole = full[check][kind] / one
            example = (whole - fewer[check][kind] / one) / (EXAMPLES[0] - EXAMPLES[1])
            step = (whole - shorter[check][kind] / one) / (STEPS[0] - STEPS[1])
            fixed = whole - EXAMPLES[0] * example - STEPS[0] * step
            row[kind] = [round(value, 3) for value in (fixed, example, step)]
        rows[check] = row | by_planned[check]
    return rows


def main() -> None:
    """Count, and write or show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    rows = table()
    if given.show:
        for check, row in rows.items():
            print(f"{check:26}", *(f"{kind} {' '.join(f'{v:8.2f}' for v in values)}" for kind, values in row.items()))
        return
    lines = [f"  {json.dumps(check)}: {json.dumps(row)}" for check, row in sorted(rows.items())]
    TARGET.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
