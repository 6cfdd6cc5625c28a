"""What a tried remedy showed, in words: what the failing check measured before and measures now; of training also the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numerics_suite.core.text import percent
from numerics_suite.diagnosis.findings import title
from numerics_suite.engine.updates import SHARE

if TYPE_CHECKING:
    from numerics_suite.core.records import Finding
    from numerics_suite.diagnosis.remedy_trials import CheckAnswer
    from numerics_suite.engine.training_loop import Trajectory

OF_TRAINING = ("train.finite", "train.descends", "train.clip", "train.amp")
"""Checks whose own answer is how training goes; of the others a loss would prove nothing."""

STARTS_TRAINING = ("load.finite", "load.head-init")
"""Checks of the weights that training starts from: their effect also says how training goes."""

WORDS = {
    "rounded-buffers": "buffers that are rounded",
    "no-counted-labels": "batches without a label that counts",
    "wrongly-tied": "embeddings that are not tied as the config says",
    "uninitialised": "parameters that nothing initialises",
    "untrained": "trained parameters that do not move",
    "other-dtype": "parameters in another dtype",
    "ignored-dtype": "parameters in another dtype",
    "coarser": "operations in a coarser float",
    "gain": "times the scale that keeps variance",
    "median-excess": "gradient error, in units of the unavoidable one",
    "excess": "error, in units of the unavoidable one",
}
"""What a measurement counts, where its name alone does not say it."""


def before_and_after(finding: Finding, own: CheckAnswer | None) -> str:
    """`buffers that are rounded 2 → 0, 0 allowed`; empty where the check has no such number under the remedy.

    Args:
        finding: before.
        own: what the failing check says now, None where it has nothing to ask.
    """
    facts = finding.evidence
    name, before, held = str(facts.get("measurement", "")), facts.get("measured"), facts.get(SHARE)
    after = None if own is None else own.measurements.get(name)
    if own is not None and isinstance(held, (int, float)):
        now = own.facts.get(name, {}).get(SHARE)
        if isinstance(now, (int, float)):
            return f"{SHARE} {percent(held)} → {percent(now)}"
        return f"{SHARE} {percent(held)} before; now every trained parameter, or the copy of it that steps, is float32"
    if not isinstance(before, (int, float)) or after is None:
        return ""
    limit = facts.get("allowed", 0)
    if facts.get("unit") == "roundoffs":
        return f"error {before:.3g} → {after:.3g} unit roundoffs, at most {limit:.3g} allowed"
    return f"{WORDS.get(name, name)} {before:.3g} → {after:.3g}, {limit:.3g} allowed"


def curve(run: Trajectory) -> str:
    """`finite; loss 1.79 → 0.48 in 5 steps`, or where it stopped being finite."""
    if run.bad is not None:
        return f"{run.bad.kind} {run.bad.name} is not finite at step {run.bad.step}"
    if len(run.losses) < 2:
        return "finite"
    return f"finite; loss {run.losses[0]:.3g} → {run.losses[-1]:.3g} in {len(run.gradient_norms)} steps"


def opened(answer: CheckAnswer) -> str:
    """What a pipeline check can ask only now: `; then …` for each new breach."""
    return "".join(f"; then {title(each)}" for each in answer.breaches)
