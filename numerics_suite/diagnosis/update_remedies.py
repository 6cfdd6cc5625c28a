"""Remedies for training in which parameters do not move: how steps are held, how large they are, what holds the parameters, what is recomputed."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn

from numerics_suite.engine.cell_context import CellContext
from numerics_suite.subjects.load import Loaded

FASTER = (10.0, 100.0, 1000.0)
"""Times the learning rate that is tried; the smallest one that helps is reported."""

NARROW = frozenset({torch.float16, torch.bfloat16})
CHECKPOINT = "_gradient_checkpointing_func"
"""Where transformers keeps a module's checkpointing function, a partial of torch's."""


def higher_rates(context: CellContext) -> Iterator[tuple[CellContext, str]]:
    """The same training at higher learning rates."""
    lr = context.request.plan.lr
    for times in FASTER if lr > 0 else ():
        yield context.variant(plan=context.with_plan(lr=lr * times)), f"lr {lr * times:.2g} (was {lr:.2g})"


def rounded(context: CellContext, how: str) -> Iterator[tuple[CellContext, str]]:
    """The same training with its steps held another way.

    Args:
        context: as above.
        how: `master` or `stochastic`.
    """
    # A head in half precision may stand beside adapters in float32, whatever the cell's own precision is.
    if any(p.dtype in NARROW for p in context.model.parameters()):
        yield context.variant(plan=context.with_plan(rounding=how)), ""


def rebuilt_optimizer(context: CellContext) -> Iterator[tuple[CellContext, str]]:
    """Optimizers over the model's own parameters, where some are held by none."""
    if context.unheld:
        yield context.variant(plan=context.with_plan(rebuilt=True)), f"with {len(context.unheld)} parameters more"


def non_reentrant(context: CellContext) -> Iterator[tuple[CellContext, str]]:
    """Checkpoints that are not reentrant, where the model has reentrant ones."""
    if has_reentrant_checkpoints(context.model):
        yield context.variant(change=_not_reentrant), "use_reentrant=False"


def has_reentrant_checkpoints(model: nn.Module) -> bool:
    """Whether a module of it recomputes its forward pass in the reentrant way."""
    return any(_is_reentrant(module) for module in model.modules())


def checkpointing_of(module: nn.Module) -> functools.partial[object] | None:
    """By what transformers recomputes the module's forward pass, None where it does not."""
    function = getattr(module, CHECKPOINT, None)
    return function if isinstance(function, functools.partial) else None


def _is_reentrant(module: nn.Module) -> bool:
    function = checkpointing_of(module)
    return function is not None and function.keywords.get("use_reentrant") is True


def _not_reentrant(loaded: Loaded) -> Loaded:
    for module in filter(_is_reentrant, loaded.model.modules()):
        own: functools.partial[object] = getattr(module, CHECKPOINT)
        words = {**own.keywords, "use_reentrant": False}
        setattr(module, CHECKPOINT, functools.partial(own.func, *own.args, **words))
    return loaded
