"""How many elements of a tensor are not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def nonfinite_count(tensor: Tensor) -> int:
    """Number of NaN and infinite elements; integers have none. A complex element is one if either part is.

    Minimum and maximum come first: if both are finite every element is, since a NaN makes both NaN.
    """
    if tensor.is_complex():
        return int(torch.count_nonzero(~torch.isfinite(tensor)))
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return 0
    if tensor.element_size() == 1:
        tensor = tensor.float()  # the dtypes of 8 bits have no such reductions
    if all(math.isfinite(extreme.item()) for extreme in torch.aminmax(tensor)):
        return 0
    return int(torch.count_nonzero(~torch.isfinite(tensor)))


def nan_count(tensor: Tensor) -> int:
    """Number of NaN elements, complex ones with a NaN in either part among them.

    Minimum and maximum come first, as in :func:`nonfinite_count`: a mask of a large weight, summed, takes nine bytes an
    element.
    """
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
        return 0
    if tensor.is_floating_point() and tensor.element_size() > 1 and not math.isnan(torch.aminmax(tensor).max.item()):
        return 0
    return int(torch.count_nonzero(torch.isnan(tensor)))


def not_finite(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that hold NaN or infinities, and of the buffers that hold NaN: -inf there is a mask.

    Args:
        model: as loaded.
    """
    parameters = (name for name, p in model.named_parameters() if nonfinite_count(p.detach()))
    return (*parameters, *(name for name, buffer in model.named_buffers() if nan_count(buffer)))
