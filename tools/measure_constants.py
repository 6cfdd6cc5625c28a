"""Measures again the constants that the budgets of `reference.*` rest on.

    python tools/measure_constants.py                            the fixtures, weights as stored and scaled, three seeds
    python tools/measure_constants.py fixture:smollm2-glm        real weights (needs the extra `real`)
    python tools/measure_constants.py --seeds 5 --precision bf16,fp16,amp-bf16

Run it under another transformers to see whether a constant moved. For each measurement and precision it prints the
smallest, the median and the largest value beside the budget that judges it.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict

import torch

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.registry import get_check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.judgement.budgets import budgets_of
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.session import SuiteSession

CHECKS = ("reference.local", "reference.end-to-end", "reference.gradient")
SCALES = (1.0, 0.25, 4.0)
"""Factors on every weight matrix: a constant of the program does not move with them."""


def scale_weights(context: CellContext, factor: float) -> None:
    """Multiply every matrix of the cell's model, a power of two, so that nothing is rounded."""
    with torch.no_grad():
        for parameter in context.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


def measured(settings: Settings, factor: float) -> list[tuple[str, str, float]]:
    """(precision, check: measurement, value) of every judged measurement of the settings' cells."""
    session = SuiteSession(settings)
    rows = []
    for cell in session.plan.cells:
        context = session.context(cell)
        scale_weights(context, factor)
        for check in CHECKS:
            try:
                found = list(get_check(check).function(context))
            except NotApplicableError:
                continue
            judged = budgets_of(check)
            rows += [(cell.precision, f"{check}: {m.name}", m.value) for m in found if m.name in judged]
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subjects", nargs="*", help="SUBJECTs; none: the fixtures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="fp32,bf16,fp16,amp-bf16,amp-fp16")
    parser.add_argument("--attn", default="eager,sdpa")
    given = parser.parse_args()
    values: dict[tuple[str, str], list[float]] = defaultdict(list)
    scales = SCALES if not given.subjects else SCALES[:1]
    for seed in range(given.seeds):
        for factor in scales:
            settings = Settings(
                subjects=tuple(given.subjects),
                precision=tuple(given.precision.split(",")),
                attn=tuple(given.attn.split(",")),
                checks=CHECKS,
                seed=seed,
            )
            for precision, name, value in measured(settings, factor):
                values[name, precision].append(value)
        print(f"seed {seed} measured", flush=True)
    print(f"{'measurement':42} {'precision':9} {'least':>9} {'median':>9} {'most':>9} {'budget':>9}")
    for (name, precision), found in sorted(values.items()):
        check, measurement = name.split(": ")
        limit = budgets_of(check)[measurement].limit
        row = (min(found), statistics.median(found), max(found), limit)
        print(f"{name:42} {precision:9}" + "".join(f" {value:9.3g}" for value in row))


if __name__ == "__main__":
    main()
