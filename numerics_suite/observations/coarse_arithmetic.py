"""Where does a run leave the requested precision? Counts ops with a coarser output, by module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from numerics_suite.engine import flex_rule
from numerics_suite.observations.module_trace import ModuleStack, module_stack
from numerics_suite.observations.roundoff import unit_roundoff


class _CoarserOps(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the ops by the module that runs them, or whose forward pass recorded them."""

    def __init__(self, stack: ModuleStack, asked: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = stack
        self.allowed = unit_roundoff(asked)
        self.found: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(self._coarser(leaf) for leaf in tree_leaves(result)):
            module = (self.stack.names[-1] if self.stack.names else self.stack.of_backward()) or ""
            self.found[module] = self.found.get(module, 0) + 1
        return result

    def _coarser(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point() and unit_roundoff(value.dtype) > self.allowed


flex_rule.watched_by(_CoarserOps)


def coarser_ops(model: nn.Module, run: Callable[[], object], asked: torch.dtype) -> dict[str, int]:
    """Ops of `run()` whose output has fewer bits than `asked`: how many, by module, in the order of the first.

    Args:
        model: whose modules name the places; "" is outside all of them.
        run: a callable without arguments: the forward pass, or forward and backward.
        asked: the dtype that the precision computes in.
    """
    with module_stack(model) as stack:
        mode = _CoarserOps(stack, asked)
        with mode:
            run()
    return mode.found
