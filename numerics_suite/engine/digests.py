"""The digest by which tensors of baselines, bundles, batches and repeated runs are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def tensor_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the tensors' dtypes, shapes and bytes, in their order.

    Args:
        tensors: of any dtype, on any device.
    """
    found = hashlib.sha256()
    for tensor in tensors:
        held = tensor.detach().cpu().contiguous()
        found.update(f"{held.dtype}{tuple(held.shape)}".encode())
        found.update(held.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def batch_key(tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    """A hashable key of the batch's contents."""
    held = sorted(tensors.items())
    return tuple((name, tensor_digest([each]) if isinstance(each, Tensor) else repr(each)) for name, each in held)
