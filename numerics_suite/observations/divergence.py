"""The module in which two runs that should agree diverge: compares true fp64 states at the compared tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from numerics_suite.core.exact import AGREED
from numerics_suite.engine.layout import INPUT, batch_first, sequence_first
from numerics_suite.engine.true_fp64 import STREAM_ABOVE_BYTES, run_true_fp64
from numerics_suite.observations.calls import watched_calls
from numerics_suite.observations.roundoff import relative_error


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two runs.

    Attributes:
        model: what is run.
        tensors: the batch, with `input_ids` `[batch, sequence]`.
        call: calls the model, once or in pieces along the sequence.
        pick: takes the compared tokens out of `[batch, sequence, …]`.
    """

    model: nn.Module
    tensors: Mapping[str, Any]
    call: Callable[[nn.Module, Mapping[str, Any]], object]
    pick: Callable[[Tensor], Tensor]


@dataclass(slots=True)
class _States:
    """Inputs and outputs of one module, one entry per call."""

    given: list[Tensor] = field(default_factory=list)
    gave: list[Tensor] = field(default_factory=list)


def first_parting(one: Side, other: Side, *, passed_over: Callable[[nn.Module], bool] | None = None) -> str | None:
    """The innermost module whose inputs agree and whose outputs do not, in the order in which modules return.

    Args:
        one: a run.
        other: the run that should agree with it.
        passed_over: modules that may differ, such as the rotary embedding where positions shift.

    Returns:
        None where there is no such module, or where the model is too large to hold all its states.
    """
    if sum(8 * parameter.numel() for parameter in one.model.parameters()) > STREAM_ABOVE_BYTES:
        return None
    left, right = _states(one), _states(other)
    turned = sequence_first(one.model)
    modules = dict(one.model.named_modules())
    for name, states in left.items():
        if name not in right or (passed_over is not None and passed_over(modules[name])):
            continue
        place = f"{name}{INPUT}"
        given = _agree(_picked(states.given, one, place, turned), _picked(right[name].given, other, place, turned))
        gave = _agree(_picked(states.gave, one, name, turned), _picked(right[name].gave, other, name, turned))
        if given is not False and gave is False:
            return name or None
    return None


def _states(side: Side) -> dict[str, _States]:
    """Of every module by name, in the order in which they first returned."""
    found: dict[str, _States] = {}

    def note(name: str, given: Tensor | None, output: Any) -> None:
        gave, states = _first_state(output), found.setdefault(name, _States())
        states.given += [] if given is None else [given]
        states.gave += [] if gave is None else [gave]

    def call(model: nn.Module, tensors: Mapping[str, Any]) -> object:
        with watched_calls(model, _first_state, note):
            return side.call(model, tensors)

    run_true_fp64(side.model, dict(side.tensors), call=call)
    return found


def _first_state(value: Any) -> Tensor | None:
    """A copy of the first floating tensor with batch and sequence among its dimensions."""
    leaves = tree_leaves(value if not hasattr(value, "to_tuple") else value.to_tuple())
    return next(
        (
            leaf.detach().cpu().clone()
            for leaf in leaves
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 2
        ),
        None,
    )


def _picked(calls: list[Tensor], side: Side, place: str, turned: frozenset[str]) -> Tensor | None:
    """The compared tokens; None for a state that has no token dimension."""
    rows, width = side.tensors["input_ids"].shape
    calls = [batch_first(part, place, turned) for part in calls]
    if not calls or any(part.shape[0] not in {1, rows} or part.shape[2:] != calls[0].shape[2:] for part in calls):
        return None
    state = torch.cat([part.expand(rows, *part.shape[1:]) for part in calls], dim=1)
    return side.pick(state) if state.shape[1] == width else None


def _agree(left: Tensor | None, right: Tensor | None) -> bool | None:
    """Whether the states agree; None if there is nothing to compare."""
    if left is None or right is None or left.shape != right.shape:
        return None
    return relative_error(right.double(), left.double()) <= AGREED
