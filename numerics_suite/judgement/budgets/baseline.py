"""Budgets of the `baseline.*` checks."""

from __future__ import annotations

from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Budget

TRUE_CURVE = 1e-8
"""AdamW divides by the root of the mean square plus 1e-8: a float64 roundoff of 1e-16 in a gradient can be 1e-8 in its step."""

STRAYS = 5.0
"""Standard deviations; a normal draw is farther off once in a million and a half."""

CURE = ("pin-version", "newer-version")

BUDGETS: tuple[Budget, ...] = (
    *(
        Budget(
            check="baseline.semantics",
            measurement=f"true-{what}",
            limit=AGREED,
            cause="semantic-change",
            title=f"the {named} of the true fp64 run differ{'s' if one else ''} from the baseline ({{value:.2g}}), first in {{module}}",
            reason="With rounding out of the way both versions run on the same batches and weights. Float64 sums in any order "
            "agree to 1e-13 of the root mean square; what differs by more than 1e-10 is another function: another formula, "
            "other weights, or a config that is read otherwise.",
            remedies=CURE,
        )
        for what, named, one in (("answers", "answers", False), ("loss", "loss", True), ("gradient", "gradient", True))
    ),
    Budget(
        check="baseline.precision",
        measurement="excess",
        limit=1,
        cause="rounding-change",
        title="the error against float64 is {value:.3g} times as large as the baseline's and chance explain",
        reason="Two versions that round alike draw their errors from one distribution. The ratio of the two root mean "
        "squares differs from 1 by about one over the square root of the independent numbers, a quarter of all; the "
        "allowance covers all comparisons of a cell at once, except in one cell in ten thousand. More means a "
        "rounding that was not there before.",
        remedies=CURE,
    ),
    Budget(
        check="baseline.precision",
        measurement="local-excess",
        limit=1,
        cause="rounding-change",
        title="the error of {module} is {value:.3g} times what the baseline's error and chance explain",
        reason="With its real inputs, the module alone is compared with its own float64 result, in both versions. The ratio "
        "of the two root mean squares differs from 1 by about one over the square root of the independent numbers. "
        "More means one rounding too many in this module: a section that left float32, or a kernel that accumulates "
        "in fewer bits.",
        remedies=("keep-in-fp32", *CURE),
    ),
    Budget(
        check="baseline.precision",
        measurement="gradient-excess",
        limit=1,
        cause="rounding-change",
        title="the error of gradients is {value:.3g} times what the baseline's errors and chance explain, first in {module}",
        reason="The median over all parameters of the error against the true fp64 gradient, with each parameter counted as "
        "one independent number, since parameters share most of the rounding of the loss. More means a new rounding "
        "in the backward pass.",
        remedies=CURE,
    ),
    Budget(
        check="baseline.training",
        measurement="became-non-finite",
        limit=0,
        cause="rounding-change",
        title="training is not finite from step {step} on; in the baseline it was",
        reason="The same batch, weights, optimizer and steps trained to the end with finite losses and gradients when the "
        "baseline was recorded.",
        remedies=CURE,
    ),
    Budget(
        check="baseline.training",
        measurement="true-curve",
        limit=TRUE_CURVE,
        cause="semantic-change",
        title="the training curve in true fp64 differs from the baseline's ({value:.2g})",
        reason="In float64 the same steps from the same weights give the same losses and gradient norms. AdamW divides each gradient "
        "by its own size plus 1e-8, which turns a roundoff of 1e-16 into 1e-8 at most; what differs by more is another optimizer "
        "step, another gradient or another loss.",
        remedies=CURE,
    ),
    Budget(
        check="baseline.training",
        measurement="curve-growth",
        limit=STRAYS,
        cause="rounding-change",
        title="losses are {value:.3g} times as far from true fp64 as rounding explains",
        reason="One draw of rounding is the effect of the logits' error on the loss, or the distance of the baseline's own "
        "curve if that is larger; the losses of all steps share it. Five times as far happens by chance once in a "
        "million and a half.",
        remedies=CURE,
    ),
    Budget(
        check="baseline.contract",
        measurement="changed-entries",
        limit=0,
        cause="contract-change",
        title="{value} entries that callers rely on changed or are gone",
        reason="Arguments of forward, output fields and their dtypes, input dtypes that are taken, the dtype that loading gives, the "
        "initialisation of a new head, the cache's class: code that worked with the baseline may fail or silently behave differently.",
        remedies=CURE,
    ),
    Budget(
        check="baseline.contract",
        measurement="vanished",
        limit=0,
        cause="contract-change",
        title="{value} parts of the baseline are missing now",
        reason="A check, an output or a number of the baseline could not be measured or is missing: nothing is known about "
        "it, which is not a pass.",
        remedies=CURE,
    ),
    Budget(
        check="baseline.contract",
        measurement="gone",
        limit=0,
        cause="contract-change",
        title="{value} modules or parameters of the baseline are no longer run or are gone",
        reason="Nothing watches what the baseline watched in them: no module of the new version, under any name, gives the "
        "same output. A missing part is either another function or a place that is no longer checked.",
        remedies=CURE,
    ),
)
