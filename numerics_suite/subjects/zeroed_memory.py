"""Uninitialised memory filled with zeros."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Zeroed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fills uninitialised memory with zeros: reused poisoned memory would look like a NaN that was written."""

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op; fill its result if unwritten."""
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func.overloadpacket.__name__.startswith(("empty", "new_empty")) else made
