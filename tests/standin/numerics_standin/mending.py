"""Where PyTorch's Python code expects of a device what a Python backend cannot give, and what it gets instead."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from numerics_standin import streams
from numerics_standin.memory import NAME
from numerics_standin.random_state import Generator


def mend() -> None:
    """Change torch where it must be changed."""
    torch.Generator = Generator
    _storages()
    _modules()
    _data()
    _new_tensor()
    _accelerator()


def _storages() -> None:
    make = torch.UntypedStorage.__new__

    def new(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> torch.UntypedStorage:
        # PyTorch looks for an allocator in C++, finds none and crashes.
        if device is None or torch.device(device).type != NAME:
            return make(cls, *args, **kwargs) if device is None else make(cls, *args, device=device, **kwargs)
        size = args[0] if args and isinstance(args[0], int) else len(args[0]) if args else 0
        tensor = torch.empty(size, dtype=torch.uint8, device=device)
        if args and not isinstance(args[0], int):
            tensor.copy_(torch.tensor(args[0], dtype=torch.uint8, device="cpu"))
        return tensor.untyped_storage()

    torch.UntypedStorage.__new__ = staticmethod(new)


def _modules() -> None:
    """Let a module that moves between CPU and device keep its parameters, as one that moves to CUDA does.

    PyTorch's C++ knows the backends whose tensors may take the place of the CPU's under `parameter.data = …`, and
    PrivateUse1 is not one of them: each parameter would be replaced by a new object, and tied ones torn apart.
    """
    apply = nn.Module._apply

    def _apply(self: nn.Module, fn: Any, recurse: bool = True) -> nn.Module:
        for parameter in self._parameters.values():
            if parameter is not None and parameter.device.type in {"cpu", NAME}:
                _move(parameter, fn)
        return apply(self, fn, recurse)  # which finds the parameters moved, and moves the buffers

    nn.Module._apply = _apply


def _move(parameter: nn.Parameter, fn: Any) -> None:
    """Give the Python object of a parameter what `fn` makes of it, if that is on another device."""
    with torch.no_grad():
        moved = fn(parameter)
        if _crosses(parameter, moved):
            grad = parameter.grad
            _exchange(parameter, moved)
            if grad is not None:
                parameter.grad = fn(grad).requires_grad_(grad.requires_grad)


def _crosses(one: torch.Tensor, other: torch.Tensor) -> bool:
    return {one.device.type, other.device.type} == {"cpu", NAME}


def _exchange(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Put what `other` is into the Python object `tensor`, which keeps attributes, class and weak references."""
    tensor.grad = None
    inside = other.detach().requires_grad_(tensor.requires_grad)
    torch._C._swap_tensor_impl(tensor, inside)


def _data() -> None:
    """Let `tensor.data = …` cross between CPU and device, as it may between CPU and CUDA; a gradient goes along."""
    plain = torch._C.TensorBase.data

    def get(self: torch.Tensor) -> torch.Tensor:
        return plain.__get__(self)

    def put(self: torch.Tensor, value: torch.Tensor) -> None:
        if not _crosses(self, value):
            plain.__set__(self, value)
            return
        grad = self.grad
        _exchange(self, value)
        if grad is not None:
            self.grad = grad.to(value.device)

    torch.Tensor.data = property(get, put)


def _new_tensor() -> None:
    """Make `new_tensor` on index 1 stay there: PyTorch asks the guard for the current device, which is always 0."""
    make = torch.Tensor.new_tensor

    def new_tensor(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.device.type == NAME:
            kwargs.setdefault("device", self.device)
        return make(self, *args, **kwargs)

    torch.Tensor.new_tensor = new_tensor


def _accelerator() -> None:
    """Let torch.accelerator know the current index and streams, of which PyTorch's Python guard has one each.

    Its memory figures are left as they are: they fail for every Python backend, and programs have to know.
    """

    def exchange(index: int) -> int:
        before = streams.current_device()
        if index >= 0:
            streams.set_device(index)
        return before

    torch._C._accelerator_getDeviceIndex = streams.current_device
    torch._C._accelerator_setDeviceIndex = streams.set_device
    torch._C._accelerator_exchangeDevice = exchange
    torch._C._accelerator_maybeExchangeDevice = exchange
    torch._C._accelerator_getStream = streams.current_stream
    torch._C._accelerator_setStream = streams.set_stream
    torch._C._accelerator_synchronizeDevice = streams.synchronize
