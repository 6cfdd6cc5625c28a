"""From what a rehearsal measured to the settings that it recommends, each with the measurement behind it."""

from __future__ import annotations

from collections.abc import Sequence

from numerics_suite.core.rehearsal import Advice, RehearsedRun

CHEAPEST = ("bf16", "amp-bf16", "amp-fp16", "tf32", "fp32", "fp64", "pure-fp16")
"""Precisions from the least memory and time to the most; pure-fp16 last, whose optimizer underflows."""

AS_GOOD = 0.9
"""Share of the best run's descent that a cheaper precision must reach.

A tenth is what two seeds of one small batch differ by; a precision that loses updates to rounding falls far behind.
"""

MARGIN = 3.0
"""A learning rate is recommended this far below the largest stable one: the next batch is another one."""

CLIP = 1.0


def recommend(runs: Sequence[RehearsedRun], *, lr: float) -> tuple[Advice, ...]:
    """Precision, learning rate, clipping and loss scaling; empty where no precision trains."""
    sound = [run for run in runs if not run.stopped and descent(run) > 0]
    if not sound:
        return _without(runs)
    best = max(sound, key=descent)
    chosen = min((run for run in sound if descent(run) >= AS_GOOD * descent(best)), key=_cost)
    return (_precision(chosen, best), _rate(chosen, lr), _clip(chosen), *_scaler(chosen))


def descent(run: RehearsedRun) -> float:
    """By how much the loss fell."""
    return run.losses[0] - run.losses[-1] if len(run.losses) > 1 else float("-inf")


def _cost(run: RehearsedRun) -> int:
    return CHEAPEST.index(run.precision) if run.precision in CHEAPEST else len(CHEAPEST)


def _precision(chosen: RehearsedRun, best: RehearsedRun) -> Advice:
    fell = f"loss {chosen.losses[0]:.3g} → {chosen.losses[-1]:.3g}"
    if chosen is best:
        because = f"{fell}, the most of all that were tried"
    else:
        because = f"{fell}; {best.precision} reaches {best.losses[-1]:.3g}"
    return Advice(setting="precision", value=chosen.precision, because=because)


def _rate(run: RehearsedRun, lr: float) -> Advice:
    limit = run.largest_stable_lr
    if limit is None:
        return Advice(setting="learning rate", value=f"below {lr:.2g}", because="no stable one was found")
    least = "at least " if run.at_least else ""
    if lr * MARGIN <= limit:
        because = f"stable, and the largest stable one is {least}{limit:.2g}"
        return Advice(setting="learning rate", value=f"{lr:.2g}", because=because)
    value = f"{limit / MARGIN:.2g}"
    because = f"a third of the largest stable one, {limit:.2g}; {lr:.2g} as asked leaves no margin"
    return Advice(setting="learning rate", value=value, because=because)


def _clip(run: RehearsedRun) -> Advice:
    largest = max(run.gradient_norms, default=float("nan"))
    curve = f"clipped to {CLIP:g} the loss ends at {run.clipped_losses[-1]:.3g}" if run.clipped_losses else ""
    if run.stopped_clipped:
        return Advice(setting="clip", value="none", because=f"clipped, {run.stopped_clipped}")
    if largest <= CLIP:
        because = f"the largest gradient norm is {largest:.3g}, so it changes nothing here and guards the next batch"
        return Advice(setting="clip", value=f"{CLIP:g}", because=because)
    return Advice(setting="clip", value=f"{CLIP:g}", because=f"the largest gradient norm is {largest:.3g}; {curve}")


def _scaler(run: RehearsedRun) -> tuple[Advice, ...]:
    if not run.scales:
        return (Advice(setting="loss scaling", value="off", because=f"{run.precision} has the range of float32"),)
    because = f"the scale ends at {run.scales[-1]:g}, {run.skipped} of {len(run.scales)} steps skipped"
    return (Advice(setting="loss scaling", value=f"GradScaler(init_scale={run.scales[-1]:g})", because=because),)


def _without(runs: Sequence[RehearsedRun]) -> tuple[Advice, ...]:
    """No precision trains at the rate asked: a lower rate if there is one."""
    stable = [run for run in runs if run.largest_stable_lr is not None]
    if not stable:
        return ()
    run = min(stable, key=_cost)
    assert run.largest_stable_lr is not None
    why = run.stopped or f"the loss rises from {run.losses[0]:.3g} to {run.losses[-1]:.3g}"
    because = f"a third of the largest stable one, {run.largest_stable_lr:.2g}; at the rate asked, {why}"
    return (
        Advice(setting="precision", value=run.precision, because="the cheapest with a stable learning rate"),
        Advice(setting="learning rate", value=f"{run.largest_stable_lr / MARGIN:.2g}", because=because),
    )
