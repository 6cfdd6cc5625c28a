"""Registers the backend with PyTorch."""

from __future__ import annotations

import warnings

import torch

_libraries: list[torch.library.Library] = []
"""A registration lasts as long as its library object."""


def register() -> None:
    """Name the device, give PyTorch its module, its guard and its kernels, and mend what Python backends lack."""
    # The steps of torch.utils.backend_registration._setup_privateuseone_for_python_backend, one by one, because the
    # modules below make devices of that name and so need the first step before they are imported.
    torch.utils.rename_privateuse1_backend("standin")
    from numerics_standin import attention, autocast, device_guard, device_module, kernels, mending

    torch.utils.generate_methods_for_privateuse1_backend()
    torch._register_device_module("standin", device_module)
    torch._C._acc.register_python_privateuseone_hook(device_guard.make_hooks())
    torch._C._acc.register_python_privateuseone_device_guard(device_guard.make_device_guard())
    library = torch.library.Library("aten", "IMPL")
    everything = torch.library.Library("_", "IMPL")
    _libraries.extend((library, everything))
    with warnings.catch_warnings():
        # PyTorch warns that some ops have a kernel already: the composition of other ops that serves any backend.
        warnings.simplefilter("ignore")
        kernels.register(library, everything)
        attention.register(library, kernels.on_host)
        autocast.register(library, everything)
    mending.mend()
