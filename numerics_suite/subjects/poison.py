"""What was never written, and what was drawn at random? Switches around building a model."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import deterministic
from torch.utils._python_dispatch import TorchDispatchMode

_FILL = "fill_uninitialized_memory"
"""A property of the module's class, which no type checker sees."""


@contextmanager
def poisoned(*, enabled: bool = True) -> Iterator[None]:
    """Fill uninitialised memory with NaN (floats) or the largest value (integers); restored on exit.

    Source: `torch.utils.deterministic.fill_uninitialized_memory`, which works only together with deterministic
    algorithms; these warn and do not raise, since a model may use an op that has none.

    Args:
        enabled: False changes nothing.
    """
    if not enabled:
        yield
        return
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill: bool = getattr(deterministic, _FILL)
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        setattr(deterministic, _FILL, True)
        yield
    finally:
        setattr(deterministic, _FILL, fill)
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)


class Zeroed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fill uninitialised memory with zeros: freed memory that was poisoned comes back, and would pass for a NaN that was written."""

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op; what it returns unwritten is written."""
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func.overloadpacket.__name__.startswith(("empty", "new_empty")) else made


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, `random` and, where it is in use, numpy; each generator's state is restored on exit.

    Args:
        seed: 0 to 2**32 - 1, numpy's range; larger ones are taken modulo.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(seed)
            random.seed(seed)
            if numpy:
                numpy.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)
