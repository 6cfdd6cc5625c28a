"""Budgets of the `reference.*` checks."""

from __future__ import annotations

from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Budget

LOCAL = (
    (
        "norm",
        0.75,
        "roundoffs",
        "a norm",
        "Computed in float32 and rounded to the dtype, then multiplied by the weight and rounded again: two roundings, each "
        "0.43 roundoffs, make 0.61 (measured 0.54 to 0.68, real weights included). Without its float32 section it is 0.82.",
    ),
    (
        "rotary",
        0.6,
        "roundoffs",
        "a rotary table",
        "Cosine and sine are computed in float32 and rounded once: 0.28 and 0.36 roundoffs (measured 0.30 to 0.41). Computed "
        "in 16 bits the angle itself is rounded, which gives 1.5 and more.",
    ),
    (
        "linear",
        1.05,
        "roundoffs",
        "a matrix product",
        "A product accumulated in float32 is rounded once: 0.43 roundoffs on the average, and never more than 1 plus what "
        "float32 accumulation adds.",
    ),
    ("embedding", 0.0, "roundoffs", "a table look-up", "Looking up a row rounds nothing."),
    (
        "composed",
        1.5,
        "times its rounded run",
        "the sum of its ops",
        "Against the same module with every op computed in float64 and rounded once; clean blocks, attentions, MLPs and, "
        "under autocast, linear layers give 0.85 to 1.2.",
    ),
)
"""Budgets of a module on its own: role, limit, unit, what it is, where the number comes from."""

CURE = ("newer-version", "pin-version")

BUDGETS: tuple[Budget, ...] = (
    Budget(
        check="reference.oracle",
        measurement="rotary-excess",
        limit=1,
        cause="semantic-error",
        title="the rotary frequencies are not those that config.json defines ({value:.3g} times as far off as rounding explains)",
        reason="The frequencies are a power and an inverse, each rounded once, and an exponent that is exact only where the "
        "rotary dimension is a power of two; the oracle adds these, and what a scaling rounds, up to the roundoffs that a right table may be off. A wrong theta, a wrong share of rotated dimensions, a scaling that is left out, or a table cast to 16 bits is not.",
        remedies=("fix-config", *CURE),
    ),
    Budget(
        check="reference.oracle",
        measurement="rotary-scale",
        limit=AGREED,
        cause="semantic-error",
        title="cosines and sines are not scaled as config.json says; off by {value:.2g} of the attention factor",
        reason="Cosine and sine of one angle have squares that add up to 1, or to the square of the attention factor that YaRN "
        "and LongRoPE scale both by. In true fp64 that holds to the last bits.",
        remedies=("fix-config", *CURE),
    ),
    *(
        Budget(
            check="reference.oracle",
            measurement=f"true-{what}",
            limit=AGREED,
            cause="semantic-error" if what != "gradient" else "wrong-gradient",
            title=f"the {what} of the true fp64 run {'differ' if what == 'logits' else 'differs'} from the family's definition ({{value:.2g}}), first in {{module}}",
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
        "times it in 16 bits (both are draws of rounding error; with thousands of elements their root mean squares "
        "differ by a few per cent), and less than the square root of the longest sum in float32. Half as much again "
        "means a rounding that the program does not contain, such as reduced-precision accumulation or TF32.",
        remedies=("eager-attention", "sdpa-attention", "pin-version"),
    ),
    Budget(
        check="reference.gradient",
        measurement="excess",
        limit=8,
        cause="wrong-gradient",
        title="the rounding error of the gradient of {parameters} is {value:.3g} times what the precision makes unavoidable",
        reason="Forward and backward pass in float64, each op rounded once, give the inherent error of each gradient. One "
        "parameter's gradient may hold few numbers, or a sum that nearly cancels (the bias of a key projection): its error "
        "and its inherent error are then two draws that differ by up to 2.9 (measured). Eight is beyond that.",
        remedies=CURE,
    ),
    Budget(
        check="reference.gradient",
        measurement="median-excess",
        limit=2,
        cause="wrong-gradient",
        title="the median rounding error of all gradients is {value:.3g} times what the precision makes unavoidable",
        reason="The median over the parameters evens out the draws of single ones, and every gradient is summed over the "
        "states of all real tokens, so few share one draw: 0.80 to 1.13 on clean models. Twice is one bit of every second "
        "gradient lost.",
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
    Budget(
        check="reference.gradient",
        measurement="coarser",
        limit=0,
        cause="low-precision-section",
        title="{value} ops of a training step compute in a coarser float than the precision, first in {module}",
        reason="An op of the forward or backward pass puts out a float with fewer bits than the precision of this run; all "
        "gradients after it carry that float's rounding error.",
        remedies=("keep-in-fp32", *CURE),
    ),
    Budget(
        check="reference.local",
        measurement="coarser",
        limit=0,
        cause="low-precision-section",
        title="{module} computes in a coarser float than the precision",
        reason="An op inside it puts out a float with fewer bits than the precision of this run. Everything after it carries "
        "that float's rounding error, however wide the dtype that the result is cast back to.",
        remedies=("keep-in-fp32", *CURE),
    ),
    *(
        Budget(
            check="reference.local",
            measurement=role,
            limit=limit,
            cause="low-precision-section",
            title=f"{{module}} rounds more than {what} needs ({{value:.3g}} {unit.replace('roundoffs', 'unit roundoffs')})",
            reason=reason
            + " The module had its real inputs, so it alone is at fault: it rounds once too often, or in too low a dtype.",
            remedies=("keep-in-fp32", *CURE),
        )
        for role, limit, unit, what, reason in LOCAL
    ),
)
