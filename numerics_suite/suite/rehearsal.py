"""The small-batch rehearsal: the user's texts, his steps and learning rate, in each precision that trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.core.records import Cell
from numerics_suite.core.rehearsal import Rehearsal, RehearsedRun
from numerics_suite.devices.precisions import precision
from numerics_suite.diagnosis.learning_rates import largest_stable_rate
from numerics_suite.diagnosis.recipe import CLIP, recommend
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.training_loop import TrainingPlan, Trajectory
from numerics_suite.suite.session import SuiteSession

EXPLODED = 2.0
"""A run whose loss ever exceeds this many times its first is not stable, whatever it ends at."""


def rehearse(session: SuiteSession, tell: Callable[[str], None] = lambda _: None) -> tuple[Rehearsal, ...]:
    """Train each subject of the session on the user's batch; `tell` takes a line before each precision."""
    cells: dict[str, list[Cell]] = {}
    for cell in session.plan.cells:
        chosen = cells.setdefault(cell.subject, [])
        if precision(cell.precision).trains and all(cell.precision != other.precision for other in chosen):
            chosen.append(_best_attention(cell, session.plan.cells))
    return tuple(found for group in cells.values() for found in _of_subject(session, group, tell))


def _best_attention(cell: Cell, cells: tuple[Cell, ...]) -> Cell:
    """The same cell with sdpa where that is planned: what training runs on."""
    return next((other for other in cells if other == replace(cell, attn="sdpa")), cell)


def _of_subject(session: SuiteSession, cells: list[Cell], tell: Callable[[str], None]) -> Iterator[Rehearsal]:
    runs = []
    first: CellContext | None = None
    for cell in cells:
        tell(f"rehearsal: {cell.subject} in {cell.precision}")
        context = session.context(cell)
        try:
            if context.training_batch is not context.usable_own_batch:
                return  # no label of the user's own counts: train.labels says so
            runs.append(_run(context))
        except NumericsSuiteError:
            continue  # the checks of this cell have said why
        first = first or context
    if first is None:
        return
    plan, task = first.request.plan, first.subject.task
    yield Rehearsal(
        subject=first.subject.id,
        task=task,
        attn=first.cell.attn,
        device=first.cell.device,
        batch=first.training_batch.drawn,
        optimizer=plan.optimizer,
        lr=plan.lr,
        steps=plan.steps,
        chance=_chance(first),
        runs=tuple(runs),
        recipe=recommend(runs, lr=plan.lr),
    )


def _chance(context: CellContext) -> float | None:
    """The loss of a classifier that knows nothing; of several classes at once each is a guess between two."""
    if not context.subject.task.endswith("classification"):
        return None
    if context.subject.task == "token-classification":
        return math.log(context.num_labels)
    return {"classes": math.log(context.num_labels), "many": math.log(2)}.get(context.space.targets)


def _run(context: CellContext) -> RehearsedRun:
    logits = context.forward(context.training_batch)["logits"]
    plain = context.trajectory
    clipped = context.train(context.with_plan(max_grad_norm=CLIP))
    stable, at_least = _largest_stable(context)
    return RehearsedRun(
        precision=context.cell.precision,
        largest_logit=float(logits.abs().max()),
        losses=plain.losses,
        gradient_norms=plain.gradient_norms,
        clipped_losses=clipped.losses,
        scales=plain.scales,
        skipped=plain.skipped,
        stopped=_stopped(plain),
        stopped_clipped=_stopped(clipped),
        largest_stable_lr=stable,
        at_least=at_least,
    )


def _stopped(run: Trajectory) -> str:
    return "" if run.bad is None else f"{run.bad.kind} {run.bad.name} is not finite at step {run.bad.step}"


def is_stable(run: Trajectory) -> bool:
    """Finite throughout, never far above its first loss, and below it at the end."""
    return (
        run.bad is None
        and len(run.losses) > 1
        and run.losses[-1] < run.losses[0]
        and max(run.losses) <= EXPLODED * abs(run.losses[0])
    )


def _largest_stable(context: CellContext) -> tuple[float | None, bool]:
    """The largest stable learning rate, and whether the search ended at its upper end."""

    def holds(plan: TrainingPlan) -> bool:
        return is_stable(context.trajectory if plan == context.request.plan else context.train(plan))

    return largest_stable_rate(context.request.plan, holds)
