"""Figures of many tensors in a few fused kernels, each a tensor of one element that stays on its device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from numerics_suite.devices.kinds import CPU

SAMPLED = 1024
"""Elements per parameter in the update-to-weight ratio: its standard error is 3 % even for one parameter alone."""


def local(tensor: Tensor) -> Tensor:
    """What this process holds of the tensor: its shard where it is a DTensor (FSDP2), so that no collective is needed."""
    shard = getattr(tensor, "_local_tensor", tensor)
    assert isinstance(shard, Tensor)
    if shard.layout is torch.sparse_coo:
        return shard.coalesce().values() if not shard.is_coalesced() else shard.values()
    return shard


def is_shard(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "_local_tensor")


def floating(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The local parts of those that hold floating numbers."""
    parts = [local(tensor.detach()) for tensor in tensors]
    return [part for part in parts if part.is_floating_point() and part.numel() and not part.is_meta]


def each_norm(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The Euclidean norm of each tensor, accumulated in at least float32; not finite where an element is not.

    Args:
        tensors: floating and local, on any devices.
    """
    norms: list[Tensor] = list(tensors)
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault((tensor.device, tensor.dtype), []).append(index)
    for (_, dtype), indices in groups.items():
        # A norm in float16 is an infinity from 65,504 on, though every element is finite.
        wide = torch.float32 if dtype.itemsize < 4 else None
        found = torch._foreach_norm([tensors[index] for index in indices], 2, dtype=wide)  # noqa: SLF001 - torch has no public foreach
        for index, norm in zip(indices, found, strict=True):
            norms[index] = norm
    return norms


def total(norms: Sequence[Tensor]) -> Tensor | None:
    """The norm of all, from the norms of each; on an accelerator where there is one among them. None of none."""
    if not norms:
        return None
    # To a device a copy may run late, since what reads it there runs later still; one to the host would be read too early.
    device = next((norm.device for norm in norms if norm.device.type != CPU), norms[0].device)
    every: Tensor = torch.stack([norm.float().to(device, non_blocking=True) for norm in norms])
    length: Tensor = torch.linalg.vector_norm(every)
    return length


@torch.no_grad()
def total_norm(tensors: Iterable[Tensor]) -> Tensor | None:
    """The Euclidean norm of all of them together, None where there are none."""
    return total(each_norm(floating(tensors)))


@torch.no_grad()
def largest(tensor: Tensor) -> Tensor:
    """The largest magnitude; NaN if any element is NaN. One pass, unlike the infinity norm, which is 20 times slower on a CPU."""
    part = local(tensor.detach())
    low, high = torch.aminmax(part)
    return torch.maximum(-low, high)


def samples(tensors: Iterable[Tensor]) -> list[Tensor]:
    """At most :data:`SAMPLED` evenly spaced elements of each tensor, copied."""
    taken = []
    for part in floating(tensors):
        flat = part.reshape(-1) if part.is_contiguous() else part.flatten()
        taken.append(flat[:: max(1, -(-flat.numel() // SAMPLED))].clone())
    return taken


@torch.no_grad()
def update_ratio(before: Sequence[Tensor], after: Sequence[Tensor]) -> Tensor | None:
    """Length of the change over the length before, over all samples; None where the weights are no weights yet."""
    if not before or len(before) != len(after):
        return None
    moved = total(each_norm([new.float() - old.float() for new, old in zip(after, before, strict=True)]))
    length = total(each_norm(list(before)))
    if moved is None or length is None:
        return None
    # A model of zeros has no length: then there is nothing to compare with, and the ratio counts as 0.
    return torch.where(length > 0, moved / length, torch.zeros_like(length))
