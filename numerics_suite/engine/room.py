"""Checks that memory suffices before work begins: later the system would kill the process, and its results with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import torch

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.devices.memory import free_bytes
from numerics_suite.engine.blocks import decoder_blocks
from numerics_suite.subjects.memory import USABLE, shallower_hint

if TYPE_CHECKING:
    from torch import nn

    from numerics_suite.engine.cell_context import CellContext

SMALL: Final = 1 << 28
"""Bytes that any machine that runs torch has, so the system is not queried."""


def require_room(device: str | torch.device, needed: float, what: str, hint: str = "") -> None:
    """Refuse work that does not fit in memory.

    Args:
        device: where it is held.
        needed: bytes.
        what: in words, the subject of a sentence.
        hint: what to do instead, after a semicolon.

    Raises:
        NotApplicableError: with the bytes needed and free.
    """
    if needed <= SMALL or needed <= USABLE * (free := free_bytes(str(device))):
        return
    reason = f"out of memory on {device}: {what} would take {int(needed)} bytes, {free} bytes free{hint}"
    raise NotApplicableError(reason)


def require_gradients(parameters: Iterable[nn.Parameter], width: float) -> None:
    """Refuse a backward pass whose gradients of all parameters would not fit.

    Args:
        parameters: of the model.
        width: bytes of an element of a gradient; 0 for as many as the parameter's.

    Raises:
        NotApplicableError: with the bytes needed and free.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    needed = sum(parameter.numel() * (width or parameter.element_size()) for parameter in trained)
    if needed > SMALL:
        count = sum(parameter.numel() for parameter in trained)
        kind = "float64 gradients" if width else "gradients"
        require_room(trained[0].device, needed, f"{kind} of {count:,} parameters")


def require_gradient_sets(context: CellContext, sets: float, *, held: bool = False) -> None:
    """Refuse a check that holds float64 gradients of all parameters, or as much as those, several times at once.

    Args:
        context: of the cell.
        sets: how many times; a fraction for gradients in another dtype.
        held: one of them is in memory already.

    Raises:
        NotApplicableError: with the bytes needed and free, and a number of layers whose gradients would fit.
    """
    count = sum(parameter.numel() for parameter in context.model.parameters() if parameter.requires_grad)
    needed = 8 * count * (sets - held)
    if needed > SMALL:
        hint = shallower_hint(context.subject, 8 * sets, USABLE * free_bytes(context.cell.device))
        much = "" if sets == 1 else f", as much as {sets:.3g} sets of them in float64,"
        what = f"{'float64 gradients' if sets == 1 else 'gradients'} of {count:,} parameters{much}"
        require_room(context.cell.device, needed, what, hint)


def require_block(model: nn.Module, copies: int) -> None:
    """Refuse work that widens one block of the model at a time, if even that does not fit.

    Args:
        model: whose blocks are made float64 one at a time.
        copies: float64 copies of a block at once.

    Raises:
        NotApplicableError: with the block's name, and the bytes needed and free.
    """
    sizes = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in decoder_blocks(model)}
    if sizes:
        largest = max(sizes, key=lambda name: sizes[name])
        device = next(model.get_submodule(largest).parameters()).device
        require_room(device, 8 * copies * sizes[largest], f"one block of the model in float64 ({largest})")
