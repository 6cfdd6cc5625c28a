"""The two objects that PyTorch's C++ asks about the device, and the answers that Python cannot give it.

PyTorch's Python device guard says that there is one device, in C++ that Python cannot override, and autograd makes its
threads by that number: a backward pass on index 1 fails an assertion. The guard's table of virtual functions is
therefore copied and the entry that counts the devices replaced. The place of the entry is read from the header in
torch's own wheel, so it follows PyTorch's releases.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

from numerics_standin import streams
from numerics_standin.switches import DEVICE_COUNT

_INCLUDE = Path(torch.__file__).parent / "include"
_GUARD_HEADER = _INCLUDE / "c10/core/impl/DeviceGuardImplInterface.h"
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
    """Return a guard that counts every index."""
    guard = DeviceGuard()
    entries = _virtual_functions(_GUARD_HEADER, "DeviceGuardImplInterface")
    count = ctypes.CFUNCTYPE(ctypes.c_int8, ctypes.c_void_p)(lambda _: DEVICE_COUNT)
    synchronize_event = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda _, __: streams.synchronize())
    synchronize_device = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int8)(
        lambda _, index: streams.synchronize(index)
    )
    synchronize_stream = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(lambda _, __: streams.synchronize())
    _replace(
        guard,
        entries,
        {
            "deviceCount": count,
            "synchronizeEvent": synchronize_event,
            "synchronizeDevice": synchronize_device,
            "synchronizeStream": synchronize_stream,
        },
    )
    return guard


def _virtual_functions(header: Path, name: str) -> list[str]:
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", header.read_text(encoding="utf-8"), flags=re.DOTALL)
    body = text[text.index(f"{name} {{") :]
    body = body[: body.index("\n};")]
    return re.findall(r"virtual\s[^;{]*?(~?\w+)\(", body)


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
