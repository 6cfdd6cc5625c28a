"""The two objects that PyTorch's C++ asks about the device, and the answers that Python cannot give it.

PyTorch's Python device guard says that there is one device, in C++ that Python cannot override, and autograd makes its
threads by that number: a backward pass on index 1 fails an assertion. The guard's table of virtual functions is
therefore copied and the entry that counts the devices replaced, with a few more of the kind. The place of an entry is
read from the header in torch's own wheel, so it follows PyTorch's releases.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from numerics_standin import streams
from numerics_standin.switches import DEVICE_COUNT

if TYPE_CHECKING:
    from collections.abc import Callable

_INCLUDE = Path(torch.__file__).parent / "include"
_GUARD_HEADER = _INCLUDE / "c10/core/impl/DeviceGuardImplInterface.h"
_HOOKS_HEADER = _INCLUDE / "ATen/detail/AcceleratorHooksInterface.h"
_LIBRARIES = Path(torch.__file__).parent / "lib"
_kept: list[object] = []
"""Tables and callbacks that C++ points to."""


class Hooks(torch._C._acc.PrivateUse1Hooks):
    """What PyTorch asks before it uses the device."""

    def is_available(self) -> bool:
        """Whether it can be used."""
        return True

    def has_primary_context(self, dev_id: int) -> bool:
        """Whether the index is in use."""
        return True

    def is_built(self) -> bool:
        """Whether PyTorch was built with it."""
        return True


class DeviceGuard(torch._C._acc.DeviceGuard):
    """What PyTorch asks for around each kernel."""

    def type_(self) -> object:
        """The kind of device."""
        return torch._C._autograd.DeviceType.PrivateUse1


def make_device_guard() -> DeviceGuard:
    """Return a guard that counts every index and whose events wait for late copies."""
    guard = DeviceGuard()
    _replace(
        guard,
        _virtual_functions(_GUARD_HEADER, "DeviceGuardImplInterface"),
        {
            "deviceCount": _callback(ctypes.c_int8, 0, lambda: DEVICE_COUNT),
            "queryEvent": _callback(ctypes.c_bool, 1, lambda _: streams.query_all()),
            "synchronizeEvent": _callback(None, 1, lambda _: streams.complete_all()),
            "synchronizeStream": _callback(None, 1, lambda _: streams.complete_all()),
        },
    )
    return guard


def make_hooks() -> Hooks:
    """Return hooks that have an allocator of pinned memory: the CPU's own, since there is no device to pin it for."""
    allocator = ctypes.CDLL(str(_LIBRARIES / "libc10.so"))._ZN3c1015GetCPUAllocatorEv
    allocator.restype = ctypes.c_void_p
    hooks = Hooks()
    _replace(
        hooks,
        _virtual_functions(_HOOKS_HEADER, "AcceleratorHooksInterface"),
        {"getPinnedMemoryAllocator": _callback(ctypes.c_void_p, 0, allocator)},
    )
    return hooks


def _callback(result: object, pointers: int, function: Callable[..., object]) -> object:
    """Make a C function of `this` and some pointers; `function` is given the pointers only."""
    return ctypes.CFUNCTYPE(result, *[ctypes.c_void_p] * (1 + pointers))(lambda _, *rest: function(*rest))


def _virtual_functions(header: Path, name: str) -> list[str]:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header.read_text(encoding="utf-8"), flags=re.DOTALL)
    body = text[text.index(f"{name} {{") :]
    body = body[: body.index("\n};")]
    names = re.findall(r"virtual\s[^;{]*?(~?\w+)\(", body)
    # A destructor has two entries: one that also frees the memory.
    return [name for name in names for _ in range(2 if name.startswith("~") else 1)]


def _replace(instance: object, entries: list[str], replacements: dict[str, object]) -> None:
    # A pybind11 instance is the Python object's header (a count and a class) and then the pointer to the C++ object,
    # which begins with the pointer to its table. The two words before the table (offset, type information) belong to it.
    word = ctypes.sizeof(ctypes.c_void_p)
    cpp = ctypes.c_void_p.from_address(id(instance) + 2 * word).value
    table = ctypes.c_void_p.from_address(cpp)
    size = len(entries) + 4
    copy = (ctypes.c_void_p * size)()
    ctypes.memmove(copy, table.value - 2 * word, size * word)
    for name, function in replacements.items():
        copy[2 + entries.index(name)] = ctypes.cast(function, ctypes.c_void_p).value
    table.value = ctypes.addressof(copy) + 2 * word
    _kept.extend((instance, copy, *replacements.values()))
