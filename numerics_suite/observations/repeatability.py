"""The module whose output changes for the same input: compares digests of inputs and outputs across runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from numerics_suite.engine.digests import tensor_digest
from numerics_suite.observations.calls import watched_calls

Digests = list[tuple[str, str, str]]


def unsteady_module(model: nn.Module, run: Callable[[], object], *, runs: int = 16) -> str | None:
    """The innermost module that got the same bits in two runs and returned different ones; None if none was seen.

    Args:
        model: whose modules name the place.
        run: a forward pass; the same one each time.
        runs: how often it is tried, since an order of summation may agree by luck.
    """
    first = _digests(model, run)
    for _ in range(runs - 1):
        again = _digests(model, run)
        for (name, given, gave), (other, given_again, gave_again) in zip(first, again, strict=False):
            if name == other and given == given_again and gave != gave_again:
                return name
    return None


def _digests(model: nn.Module, run: Callable[[], object]) -> Digests:
    """Name, digest of the inputs and digest of the outputs, in the order in which modules return."""
    found: Digests = []

    def note(name: str, given: str, output: Any) -> None:
        found.append((name, given, _digest(output)))

    with watched_calls(model, _digest, note):
        run()
    return found


def _digest(value: Any) -> str:
    leaves = tree_leaves(value if not hasattr(value, "to_tuple") else value.to_tuple())
    return tensor_digest(leaf for leaf in leaves if isinstance(leaf, Tensor))
