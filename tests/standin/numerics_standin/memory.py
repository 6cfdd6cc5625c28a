"""Device tensors over CPU memory, and the account of the bytes that they hold.

DLPack names devices by number, and the number 12 ("extension device") is PrivateUse1 to PyTorch. A CPU tensor whose
DLPack capsule is relabelled to that number before it is imported becomes a genuine PrivateUse1 tensor: of class
`torch.Tensor`, with a storage that its views share, with PyTorch's own autograd, version counter and `data_ptr`. The
way back is the same. Each side keeps the other's memory alive, and no bytes are copied.
"""

from __future__ import annotations

import ctypes

import torch

from numerics_standin.switches import DEVICE_COUNT, switches

NAME = "standin"

_KDL_CPU = 1
_KDL_EXT_DEV = 12

_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_int64_at = ctypes.c_int64.from_address
_to_dlpack = torch._C._to_dlpack
_from_dlpack = torch._C._from_dlpack


def _relabelled(tensor: torch.Tensor, device: int) -> torch.Tensor:
    capsule = _to_dlpack(tensor)
    # struct DLTensor { void* data; struct { int32_t device_type; int32_t device_id; } device; … }
    _int64_at(_capsule_pointer(capsule, b"dltensor") + 8).value = device
    return _from_dlpack(capsule)


class Account:
    """Bytes of one device index: held now, and most held since the last reset."""

    def __init__(self) -> None:
        self.allocated = 0
        self.peak = 0
        self.allocations = 0


accounts = [Account() for _ in range(DEVICE_COUNT)]


class _Block:
    """Hangs on a device storage and is deleted with it, which is when its bytes are free again."""

    __slots__ = ("index", "size")

    def __init__(self, index: int, size: int) -> None:
        self.index = index
        self.size = size

    def __del__(self) -> None:
        accounts[self.index].allocated -= self.size


def reserve(index: int, size: int) -> None:
    """Check that `size` more bytes fit.

    Raises:
        torch.OutOfMemoryError: They do not; nothing is allocated.
    """
    used = accounts[index].allocated
    if used + size > switches.capacity:
        message = (
            f"{NAME} out of memory. Tried to allocate {_readable(size)}. Device {index} has a total capacity of "
            f"{_readable(switches.capacity)} of which {_readable(max(0, switches.capacity - used))} is free. "
            f"This process has {_readable(used)} memory in use."
        )
        raise torch.OutOfMemoryError(message)


def _readable(size: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


def to_device(host: torch.Tensor, index: int) -> torch.Tensor:
    """Return the device tensor over `host`'s memory, which nothing else may go on using.

    Raises:
        torch.OutOfMemoryError: It does not fit.
        TypeError: It is float64, and the device is set to have none.
    """
    if not switches.float64 and host.dtype is torch.float64:
        message = (
            "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
            "Please use float32 instead."
        )
        raise TypeError(message)
    size = host.untyped_storage().nbytes()
    account = accounts[index]
    if account.allocated + size > switches.capacity:
        reserve(index, size)
    tensor = _relabelled(host, _KDL_EXT_DEV | index << 32)
    tensor.untyped_storage().standin_block = _Block(index, size)
    account.allocated += size
    account.allocations += 1
    account.peak = max(account.peak, account.allocated)
    return tensor


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Return the CPU tensor over the memory of a device tensor; a write to either is seen in both."""
    return _relabelled(tensor, _KDL_CPU)
