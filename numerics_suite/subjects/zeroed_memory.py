"""Memory that nothing has written, as zeros."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Zeroed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fill uninitialised memory with zeros: freed memory that was poisoned comes back, and would pass for a NaN that was written."""

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op; what it returns unwritten is written."""
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func.overloadpacket.__name__.startswith(("empty", "new_empty")) else made
