"""train.finite."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.checks.train._curves import gradient_norms, losses
from numerics_suite.core.records import Measurement, Series
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.training_loop import TRAJECTORY


@check(trains=True, runs_on_nonfinite=True, reads=(TRAJECTORY,))
def finite(context: CellContext) -> Iterable[Measurement | Series]:
    """Do loss, logits, gradients, parameters and optimizer state stay finite at every step?"""
    run = context.trajectory
    bad = run.bad
    facts: dict[str, float | str] = {"losses": ", ".join(f"{loss:.4g}" for loss in run.losses)}
    if run.gradient_norms:
        facts["gradient norms"] = ", ".join(f"{norm:.3g}" for norm in run.gradient_norms)
    if bad is not None:
        facts |= {"first": f"{bad.kind} {bad.name}", "and others": bad.others, "trained parameters": len(run.trained)}
    yield Measurement(
        name="non-finite",
        value=0 if bad is None else 1 + bad.others,
        unit="tensors",
        step=bad.step if bad else None,
        module=bad.name.rpartition(".")[0] if bad and bad.kind in {"gradient", "parameter"} else None,
        parameters=(bad.name,) if bad and bad.kind in {"gradient", "parameter", "optimizer state"} else (),
        facts=facts,
    )
    yield Measurement(name="steps", value=len(run.gradient_norms), unit="steps")
    if run.losses:
        yield Measurement(name="first-loss", value=run.losses[0], unit="nats")
        yield Measurement(name="last-loss", value=run.losses[-1], unit="nats")
    yield from losses(run)
    yield from gradient_norms(run)
