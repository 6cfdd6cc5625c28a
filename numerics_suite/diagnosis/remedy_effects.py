"""What a tried remedy showed, in words: what the failing check measured before and measures now; of training also the loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

from numerics_suite.core.text import percent
from numerics_suite.diagnosis.findings import title
from numerics_suite.engine.updates import NO_GRADIENT, SHARE

if TYPE_CHECKING:
    from numerics_suite.core.records import Finding
    from numerics_suite.diagnosis.remedy_trials import CheckAnswer
    from numerics_suite.engine.training_loop import Trajectory

OF_TRAINING = ("train.finite", "train.descends", "train.clip", "train.amp")
"""Checks whose own answer is how training goes; of the others a loss would prove nothing."""

STARTS_TRAINING = ("load.finite", "load.head-init")
"""Checks of the weights that training starts from: their effect also says how training goes."""

WORDS = {
    "true": "difference of the outputs in float64",
    "true-pooled": "difference of the outputs in float64",
    "true-answers": "difference of the outputs in float64",
    "true-logits": "difference of the logits in float64",
    "true-loss": "difference of the loss in float64",
    "true-gradient": "difference of the gradient in float64",
    "true-training-mode": "difference of the gradient in float64",
    "rounded": "error, in units of the plain run's",
    "excess": "error, in units of the unavoidable one",
    "median-excess": "gradient error, in units of the unavoidable one",
    "rotary-excess": "error of the rotary frequencies, in units of their rounding",
    "loss-error": "error of the loss, in unit roundoffs",
    "rise": "rise of the loss",
    "non-finite": "values that are not finite",
    "differing": "values that differ",
    "integer-disagreement": "values that differ",
    "disagreement": "values that differ",
    "logits-changed": "logits that change",
    "coarser": "operations in a coarser float",
    "merged-ids": "pairs of ids with one embedding",
    "merged-edges": "pairs of ids with one embedding",
    "floating": "floating tensors that must be integral",
    "out-of-range": "batches with ids outside the vocabulary",
    "looks-rounded": "tensors that look rounded",
    "padding-moves": "change of the logits by padding",
    "tokenizer-raises": "exceptions of the tokenizer",
    "no-pad-token": "missing pad tokens",
    "no-counted-labels": "batches without a label that counts",
    "wrong-rows": "rows read at a wrong position",
    "ignored": "config keys that are ignored",
    "ignored-dtype": "parameters in another dtype",
    "other-dtype": "parameters in another dtype",
    "dtype-drift": "parameters or gradients that change their dtype",
    "rounded-buffers": "buffers that are rounded",
    "uninitialised": "uninitialised parameters",
    "uninitialised-buffers": "uninitialised buffers",
    "gain": "scale of the new weights, where 1 keeps the variance",
    "wrongly-tied": "embeddings that are not tied as the config says",
    "stored-apart": "tied embeddings that are stored with two values",
    "missing": "weights that are missing",
    "unexpected": "stored tensors without a place",
    "mismatched": "stored tensors of another shape",
    "renamed": "weights stored under another name",
    "changed": "weights that differ from the stored ones",
    "dead": "trained parameters without a gradient",
    "untrained": "trained parameters that do not move",
}
"""What a measurement counts, where its name alone does not say it."""


def before_and_after(finding: Finding, own: CheckAnswer | None) -> str:
    """`buffers that are rounded: 2 before, now 0`; empty where the check has no such number under the remedy.

    Args:
        finding: before.
        own: what the failing check says now, None where it has nothing to ask.
    """
    facts = finding.evidence
    name, before, held = str(facts.get("measurement", "")), facts.get("measured"), facts.get(SHARE)
    after = None if own is None else own.measurements.get(name)
    if own is not None and isinstance(held, (int, float)):
        # By any measurement: a finding of the watch names none.
        now = next((each[SHARE] for each in own.facts.values() if SHARE in each), None)
        if isinstance(now, (int, float)):
            return f"{SHARE}: {percent(held)} before, now {percent(now)}"
        return f"{SHARE}: {percent(held)} before; now no optimizer step is taken in a narrow dtype"
    if own is not None and before is None and NO_GRADIENT in facts and "untrained" in own.measurements:
        name, before, after = "untrained", facts[NO_GRADIENT], own.measurements["untrained"]
    if not isinstance(before, (int, float)) or after is None:
        return ""
    words = "error in unit roundoffs" if facts.get("unit") == "roundoffs" else WORDS.get(name, name)
    # A count that must be zero needs no limit beside it.
    limit = f" (at most {facts['allowed']:.3g})" if facts.get("allowed") else ""
    return f"{words}: {_figure(before)} before, now {_figure(after)}{limit}"


def _figure(value: float) -> str:
    """Three digits, without an exponent for thousands."""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e6 else f"{value:.3g}"


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
