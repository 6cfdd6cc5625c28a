"""Where and why a value goes bad in steps that are taken again from a snapshot."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.diagnosing.causes import SLOWER, USUAL, cause_of
from numerics_suite.observing.locate import Origin, find_origin
from numerics_suite.watching.retraining import (
    BadValueError,
    Condition,
    Replay,
    Run,
    Start,
    copied,
    factor_of,
    undisturbed,
)
from numerics_suite.watching.ring import Call
from numerics_suite.watching.stepping import eps_is_zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What came of the steps.

    Attributes:
        origin: the op, None where no single one shows it.
        how: what was run, in words.
        cause: of the contract.
    """

    origin: Origin | None
    how: str
    cause: str


def trained_origin(model: nn.Module, start: Start, largest: float) -> Trained | None:
    """Take the steps from a start again, and find the op where they go bad; None where they cannot be taken or stay finite.

    Args:
        model: left as it is.
        start: whose calls end with the bad step.
        largest: bytes of parameters of which a copy is made.
    """
    if start.kept.loop is None:
        return None
    try:
        with undisturbed():
            return _trained_origin(lambda: copied(model, start, largest), start)
    except (NotApplicableError, RuntimeError, ValueError, TypeError, KeyError, IndexError):
        return None  # a replay that ends in an error has shown what it could


def _trained_origin(copy: Callable[[], nn.Module], start: Start) -> Trained | None:
    start = replace(start, kept=replace(start.kept, factor=factor_of(copy(), start.kept)))
    run = Replay(copy(), start.kept).run()
    if run.bad_step is None:
        return None
    replay = Replay(copy(), start.kept)
    replay.run(until=run.bad_step)
    underflows = run.after_update and any(map(eps_is_zero, replay.optimizers))
    origin = _origin_of(replay, run.bad_step)
    on = f", trained on to step {run.bad_step}" if run.bad_step > start.first else ""
    how = f"with {start.words}{on}"
    if underflows:
        return Trained(origin=origin, how=how, cause="optimizer-underflow")
    moved = run.after_update or run.bad_step > start.first
    masked = origin is not None and origin.masked_row
    if moved and not masked and _slower_is_finite(copy, start):
        return Trained(origin=origin, how=how, cause="divergence")  # smaller steps over the same batches stay finite
    return Trained(origin=origin, how=how, cause="unknown" if origin is None else cause_of(origin))


def _slower_is_finite(copy: Callable[[], nn.Module], start: Start) -> bool:
    assert start.kept.loop is not None
    lr = start.kept.loop.lr
    factors = (1 / SLOWER, *((USUAL / lr,) if lr / SLOWER > USUAL else ()))
    return any(Replay(copy(), start.kept, Condition(lr_factor=factor)).run().bad_step is None for factor in factors)


def _origin_of(replay: Replay, step: int) -> Origin | None:
    def forward(call: Call) -> object:
        with torch.no_grad():
            return replay.forward(call)

    for call in replay.calls[step]:
        origin = find_origin(replay.model, functools.partial(forward, call))
        if origin is not None:
            return origin

    def whole() -> object:
        with contextlib.suppress(BadValueError):
            replay.step(step, Run())
        parameters = dict(replay.model.named_parameters())
        return [each.state for each in replay.optimizers], parameters, [p.grad for p in parameters.values()]

    return find_origin(replay.model, whole)
