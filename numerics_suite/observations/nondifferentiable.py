"""Does a backward pass go through an activation whose derivative jumps, as ReLU's does at zero?"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from numerics_suite.engine import flex_rule

_ATEN: Final = torch.ops.aten
JUMPING: Final = frozenset(
    {
        _ATEN.threshold_backward.default,
        _ATEN.leaky_relu_backward.default,
        _ATEN.hardtanh_backward.default,
        _ATEN.hardswish_backward.default,
        _ATEN.hardsigmoid_backward.default,
    }
)
"""The backward passes of ReLU and its relatives, in every spelling."""


class Kinks(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records whether such an op ran.

    Attributes:
        found: one did.
    """

    def __init__(self) -> None:
        """Nothing found yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run `func` as it is."""
        self.found = self.found or func in JUMPING
        return func(*args, **(kwargs or {}))


flex_rule.watched_by(Kinks)
