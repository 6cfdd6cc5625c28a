"""train.clip."""

from __future__ import annotations

import math
from collections.abc import Iterable

from numerics_suite.checks.train._curves import clipped_norms, gradient_norms, losses
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement, Series
from numerics_suite.core.registry import check
from numerics_suite.engine.evidence import Evidence
from numerics_suite.engine.training_loop import Trajectory

LIMIT = 1.0
"""The norm that GLM-4's fine-tuning recipes clip to."""


@check(trains=True)
def clip(evidence: Evidence) -> Iterable[Measurement | Series]:
    """Does clipping the total gradient norm hold it at the limit and keep training finite?

    Where clipping to 1.0 keeps a run finite that is not finite without, that is said: the gradients explode.
    """
    asked = evidence.request.plan.max_grad_norm
    limit = asked if asked is not None else LIMIT
    run = evidence.trajectory if asked is not None else evidence.train(evidence.with_plan(max_grad_norm=limit))
    free = evidence.trajectory
    yield from (*losses(run), *gradient_norms(run), *clipped_norms(run))
    if run.bad is not None and (free.bad is None or run.bad.step <= free.bad.step):
        if free.bad is not None:
            reason = "training is not finite with or without clipping (train.finite)"
            raise NotApplicableError(reason)
        yield Measurement(name="non-finite", value=1, unit="runs", step=run.bad.step)
        return
    if not run.clipped_norms:
        reason = "no step came as far as clipping"
        raise NotApplicableError(reason)
    largest = max(run.clipped_norms)
    yield Measurement(
        name="excess",
        value=max(0.0, largest / limit - 1.0) if math.isfinite(largest) else largest,
        unit="ratio",
        facts={"largest norm after clipping": largest, "limit": limit, "largest before": max(run.gradient_norms)},
    )
    yield Measurement(
        name="saved-by-clipping",
        value=int(_exploded(free) and not _exploded(run)),
        unit="runs",
        step=free.bad.step if free.bad else None,
        facts={"without clipping": _curve(free), "with clipping": _curve(run)},
    )


def _exploded(run: Trajectory) -> bool:
    """Non-finite, or a loss that grew tenfold at any step.

    A model that exploded may end at a small loss: with every state gone it puts the same odds on every token.
    """
    return run.bad is not None or (len(run.losses) > 1 and max(run.losses) > 10 * max(abs(run.losses[0]), 1.0))


def _curve(run: Trajectory) -> str:
    return ", ".join(f"{loss:.4g}" for loss in run.losses) + ("" if run.bad is None else f", then {run.bad.kind} NaN")
