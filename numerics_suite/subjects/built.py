"""The buffers that a class builds from its config: what a load may hold, before a cast or a file had a part in it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.devices.random_state import seeded
from numerics_suite.subjects import compat
from numerics_suite.subjects.quiet import quiet_transformers


def without_adapter(model: nn.Module) -> nn.Module:
    """The model that peft wraps, or the model itself.

    Args:
        model: of transformers or of peft.
    """
    unwrapped: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return unwrapped


def built_buffers(model: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor] | None:
    """The buffers of another model of the same class and config, by name, as its constructor makes them.

    Its parameters are on the meta device, so it costs no memory to speak of. A buffer whose dtype is not `dtype` has one that the
    class itself names.

    Args:
        model: of transformers, without an adapter.
        dtype: torch's default dtype while the class builds, as in a load at that dtype.

    Returns:
        None where the class cannot be built from its config alone.
    """
    if not compat.is_language_model(model):
        return None
    config: Any = copy.deepcopy(model.config)
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with quiet_transformers(), seeded(0), _parameters_on_meta():
            other = type(model)(config)
    except Exception:  # noqa: BLE001 - a class of the user's own may ask for more than a config, in any way
        return None
    finally:
        torch.set_default_dtype(default)
    return dict(other.named_buffers())


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Each parameter goes to the meta device as soon as its module has it, so its initialisation writes nothing."""
    own = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        moved = None if param is None else nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
        own(self, name, moved)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = own  # type: ignore[method-assign]
