"""The dtype in which a program computes log-probabilities.

Under CUDA's autocast a cross entropy of 16-bit logits is float32 and not as precise: `aten::cross_entropy_loss` asks
`log_softmax` for its input's own dtype, so the log-probabilities are rounded to 16 bits before `nll_loss` is cast to float32
(ATen, LossNLL.cpp and autocast_mode.h). The CPU's autocast casts the whole loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from numerics_suite.observations.roundoff import unit_roundoff


class _LogSoftmax(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the coarsest float in which log-probabilities are computed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.coarsest = torch.float64

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._log_softmax.default and isinstance(result, Tensor):  # noqa: SLF001 - the op's name
            self.coarsest = max(self.coarsest, result.dtype, key=unit_roundoff)
        # Of several classes at once: log sigmoid is computed in the logits' own dtype, and only then meets float32 targets.
        if func is torch.ops.aten.binary_cross_entropy_with_logits.default:
            self.coarsest = max(self.coarsest, args[0].dtype, key=unit_roundoff)
        return result


def log_softmax_dtype(run: Callable[[], object]) -> torch.dtype:
    """The coarsest float in which `run()` computes log-probabilities; float64 where it computes none.

    Args:
        run: a forward pass with labels.
    """
    mode = _LogSoftmax()
    with mode:
        run()
    return mode.coarsest
