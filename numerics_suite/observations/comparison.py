"""Comparing tensors without a tolerance."""

from __future__ import annotations

import torch
from torch import Tensor


def differing_elements(left: Tensor, right: Tensor) -> int:
    """Elements that differ in value, NaN being equal to NaN; every element where shape or dtype differ."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return max(left.numel(), right.numel(), 1)
    if torch.equal(left, right):  # the usual answer, without masks
        return 0
    return int((~((left == right) | (left.isnan() & right.isnan()))).sum())
