"""Budgets of the `forward.*` checks."""

from __future__ import annotations

from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Budget

NOT_FINITE = (
    "A value that is not finite spreads to the loss, to every gradient and, with the first optimizer step, to every "
    "parameter."
)

ROUNDED_LAW = 8.0
"""Error of the transformed run in units of the inherent error of the plain one.

Both are draws of the same rounding error over as few as one token; the inherent error of one draw can be a few times
smaller than another's when a single early rounding dominates. A law broken in this precision only (a mask value that
rounds to nothing, a NaN, a cache in a lower dtype) is off by tens and more.
"""

PRECISION_ONLY = " (an error of {value:.3g} times the inherent one, in this precision only)"
EXACT_REASON = (
    "In true fp64 there is no rounding to hide behind: the two sides agree to 1e-10 of the output's root mean square, or "
    "the model computes something else."
)
ROUNDED_REASON = (
    "The law holds in true fp64 and the transformed run is farther from it than the precision explains, so a step of it "
    "depends on the dtype."
)
LAWS = (
    ("padding", "padding-leak", "padding changes the outputs at real tokens", ("fix-padding", "newer-version")),
    (
        "packing",
        "packing-leak",
        "rows packed into one row by {facts[packed by]} see each other",
        ("separate-rows", "newer-version"),
    ),
    ("batch", "batch-leak", "a row's output depends on the other rows of the batch", ("newer-version",)),
    ("causal", "future-leak", "a later token changes the outputs before it", ("newer-version", "sdpa-attention")),
    ("cache", "cache-mismatch", "decoding with the cache differs from the full forward pass", ("newer-version",)),
    ("attention", "attention-mismatch", "attention implementations disagree", ("eager-attention", "newer-version")),
)

BUDGETS = (
    Budget(
        check="forward.finite",
        measurement="non-finite",
        limit=0,
        cause="invalid-operation",
        title="outputs hold NaN or infinite elements ({value})",
        reason=NOT_FINITE,
        remedies=("keep-in-fp32", "use-amp-bf16", "eager-attention"),
    ),
    Budget(
        check="forward.headroom",
        measurement="non-finite",
        limit=0,
        cause="overflow",
        title="activations leave the range of the dtype, first in {module}",
        reason="Hypothesis climbed the largest activation until it left the range of the dtype. " + NOT_FINITE,
        remedies=("keep-in-fp32", "use-amp-bf16"),
    ),
    Budget(
        check="forward.deterministic",
        measurement="differing",
        limit=0,
        cause="nondeterminism",
        title="the same input twice gives different outputs ({value} elements)",
        reason="In eval mode the same input on the same device must give the same bits. Dropout left on, state kept "
        "between calls, or a reduction without a fixed order makes every comparison a lottery.",
        remedies=("newer-version", "pin-version"),
    ),
    Budget(
        check="forward.pooling",
        measurement="wrong-shape",
        limit=0,
        cause="wrong-output-shape",
        title="the classifier's logits have the shape {facts[shape]}, not {facts[expected]}",
        reason="A sequence has one class: the logits are [rows, labels]. Logits for each token are a token classifier's, and a loss over "
        "them and the rows' labels is an error or another task's.",
        remedies=("fix-config",),
    ),
    Budget(
        check="forward.pooling",
        measurement="wrong-rows",
        limit=0,
        cause="wrong-pooling",
        title="the classifier reads another position than the last real token in {value} rows",
        reason="The logits are nearer to the head's output at another position, such as padding; the class then depends on "
        "how much padding a batch happens to have.",
        remedies=("set-pad-token", "fix-padding"),
    ),
    *(
        Budget(
            check=f"forward.{law}",
            measurement=measurement,
            limit=AGREED if measurement.startswith("true") else ROUNDED_LAW,
            cause=cause,
            title=title + (" ({value:.2g} in true fp64)" if measurement.startswith("true") else PRECISION_ONLY),
            reason=(EXACT_REASON if measurement.startswith("true") else ROUNDED_REASON),
            remedies=remedies,
        )
        for law, cause, title, remedies in LAWS
        for measurement in ("true", "rounded", *(("true-pooled",) if law == "padding" else ()))
    ),
)
