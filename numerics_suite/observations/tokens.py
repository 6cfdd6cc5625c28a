"""Selects a state's rows at real tokens, in layout `[batch, sequence]`, `[sequence, batch]` or both in one."""

from __future__ import annotations

from torch import Tensor


def at_real(real: Tensor | None, values: Tensor) -> Tensor:
    """The rows at real tokens, `[tokens, …]`; the values unchanged if no layout fits.

    Args:
        real: `[batch, sequence]` bool, None where every token is real.
        values: a state.
    """
    found = None if real is None else token_rows(real, values)
    return values if found is None else found


def token_rows(real: Tensor, values: Tensor) -> Tensor | None:
    """The rows at real tokens, `[tokens, …]`; None where the state has no dimensions of tokens.

    Args:
        real: `[batch, sequence]` bool.
        values: a state.
    """
    for mask in (real, real.t(), real.flatten()):
        if values.dim() > mask.dim() and values.shape[: mask.dim()] == mask.shape:
            return values[mask.to(values.device)]
    return None
