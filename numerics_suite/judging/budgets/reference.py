"""Budgets of the `reference.*` checks."""

from __future__ import annotations

from numerics_suite.core.records import Budget

EXACT = 1e-10
"""`max|a-b| / rms` of two float64 computations of one thing.

Measured 4e-15 to 3e-14 over transformers 4.46.3 to 5.24.0; float64's unit roundoff is 1.1e-16, so a model would need sums
of a million times that to come near, while a mistake of one part in a billion is over it.
"""

CURE = ("newer-version", "pin-version")

BUDGETS: tuple[Budget, ...] = (
    Budget(
        check="reference.oracle",
        measurement="rotary-roundoffs",
        limit=2,
        cause="semantic-error",
        title="the rotary table is {value:.3g} roundoffs from the one that config.json defines",
        reason="The frequencies are a power and an inverse, each rounded once, so two roundoffs of the table's dtype are the "
        "most that a right one is off. A wrong theta, a wrong share of rotated dimensions, or a table cast to 16 bits is not.",
        remedies=("fix-config", *CURE),
    ),
    *(
        Budget(
            check="reference.oracle",
            measurement=f"true-{what}",
            limit=EXACT,
            cause="semantic-error" if what != "gradient" else "wrong-gradient",
            title=f"the {what} of the true fp64 run differs from the family's definition ({{value:.2g}}), first in {{module}}",
            reason="With rounding out of the way the model computes something else than its family's definition gives for "
            "the same config and weights: an activation, an eps, a residual, an order of heads or a mapped weight is wrong.",
            remedies=CURE,
        )
        for what in ("logits", "loss", "gradient")
    ),
    Budget(
        check="reference.end-to-end",
        measurement="excess",
        limit=1.5,
        cause="kernel-accuracy",
        title="the error against float64 is {value:.3g} times what the precision makes unavoidable",
        reason="The error of perfect kernels that round once per op is the inherent error. Clean models measure 0.9 to 1.2 "
        "times it in 16 bits (both are draws of rounding error; with thousands of elements their root mean squares differ "
        "by a few per cent), and less than the square root of the longest sum in float32. Half as much again is a "
        "rounding that the program does not ask for, such as reduced-precision accumulation or TF32.",
        remedies=("eager-attention", "sdpa-attention", "pin-version"),
    ),
    Budget(
        check="reference.gradient",
        measurement="excess",
        limit=3,
        cause="wrong-gradient",
        title="the gradient of {parameters} errs {value:.3g} times as much as the precision makes unavoidable",
        reason="Forward and backward pass in float64, each op rounded once, give the inherent error of each gradient. One "
        "parameter's gradient may hold few numbers (a norm's weight), so its error scatters more than the logits'; three "
        "times is beyond that.",
        remedies=CURE,
    ),
    Budget(
        check="reference.gradient",
        measurement="lost",
        limit=0,
        cause="dead-gradient",
        title="{value} parameters have a gradient in true fp64 and none in this precision: {parameters}",
        reason="The loss reaches these parameters by the same program in float64.",
        remedies=CURE,
    ),
)
