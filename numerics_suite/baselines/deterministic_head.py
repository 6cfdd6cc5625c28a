"""A new head by formula: its random draw is no property of a release, so it has no part in a baseline's numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.baselines.sketch import uniform
from numerics_suite.engine.cell_context import CellContext


@contextmanager
def head_by_formula(context: CellContext) -> Iterator[nn.Module]:
    """The cell's model with the values of an initialised new head replaced, inside the context.

    What is uninitialised stays NaN, as it is loaded: everything that it reaches is NaN then, as it should be.

    Args:
        context: of the cell; answers that it keeps are set aside.
    """
    unwritten = set(context.unwritten)
    names = [name for name in context.loaded.new_head if name not in unwritten]
    with context.modified_model() as model:
        kept = {name: model.get_parameter(name).detach().clone() for name in names}
        try:
            with torch.no_grad():
                for name in names:
                    parameter = model.get_parameter(name)
                    parameter.copy_(formula_values(name, parameter))
            yield model
        finally:
            with torch.no_grad():
                for name, values in kept.items():
                    model.get_parameter(name).copy_(values)


def formula_values(name: str, parameter: Tensor) -> Tensor:
    """A weight as xavier-uniform would scale it, biases zero, scales of norms one; the parameter's shape and dtype."""
    if parameter.dim() < 2:
        constant = 0.0 if name.endswith("bias") else 1.0
        return torch.full_like(parameter, constant)
    fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(parameter)  # noqa: SLF001 - torch's own rule
    bound = math.sqrt(6 / (fan_in + fan_out))
    drawn = torch.from_numpy(uniform(f"head {name}", parameter.numel()))
    return ((2 * drawn - 1) * bound).reshape(parameter.shape).to(parameter)


def head_statistics(context: CellContext) -> dict[str, dict[str, Any]]:
    """Of each new parameter as the release draws it: whether anybody wrote it, and mean and deviation of the draw."""
    unwritten = set(context.unwritten)
    found = {}
    for name in context.loaded.new_head:
        values = context.model.get_parameter(name).detach().cpu().double()
        written = name not in unwritten
        spread = float(values.std(correction=0)) if written else math.nan
        found[name] = {
            "initialised": written,
            "count": values.numel(),
            "mean": float(values.mean()) if written else math.nan,
            "std": spread,
        }
    return found
