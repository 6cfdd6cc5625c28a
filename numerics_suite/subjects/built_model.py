"""What a class builds from its config: buffers and dtypes before a file or a cast changes them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.attributes import with_attribute
from numerics_suite.devices.arithmetic import torch_default_dtype
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


def is_outside_body(model: nn.Module, name: str) -> bool:
    """Whether a parameter lies outside the body of its class: remote code may give its head any name.

    Args:
        model: of transformers or of peft.
        name: of a parameter of it.
    """
    inner = without_adapter(model)
    body = getattr(inner, "base_model_prefix", "")
    if not body or not isinstance(getattr(inner, body, None), nn.Module):
        return False
    return not name.removeprefix("base_model.model." if inner is not model else "").startswith(f"{body}.")


def built_buffers(model: nn.Module, dtype: torch.dtype) -> Mapping[str, Tensor] | None:
    """The buffers of another model of the same class and config, by name, as its constructor makes them.

    A buffer whose dtype is not `dtype` has one that the class itself names.

    Args:
        model: of transformers, without an adapter.
        dtype: torch's default dtype while the class builds, as in a load at that dtype.

    Returns:
        None where the class cannot be built from its config alone.
    """
    other = _built(model, dtype)
    return None if other is None else dict(other.named_buffers())


def built_dtypes(
    model: nn.Module,
    dtype: torch.dtype,
    *,
    kind: type[nn.Module] | None = None,
    changed: Mapping[str, Any] | None = None,
) -> Mapping[str, torch.dtype]:
    """The dtypes in which the class builds its parameters, by name; empty where it cannot be built from its config alone.

    Args:
        model: of transformers, without an adapter.
        dtype: torch's default dtype while the class builds; a parameter in another one has a dtype that the class itself names.
        kind: another class to build from the config, None for the model's own.
        changed: changed values of the config, by attribute.
    """
    other = _built(model, dtype, changed, kind)
    return {} if other is None else {name: parameter.dtype for name, parameter in other.named_parameters()}


def built_with(model: nn.Module, changed: Mapping[str, Any]) -> nn.Module | None:
    """A model of the same class with its parameters on the meta device, from a config with some changed values.

    Args:
        model: of transformers, without an adapter.
        changed: values by attribute.

    Returns:
        None if the class cannot be built this way.
    """
    return _built(model, torch.get_default_dtype(), changed)


def _built(
    model: nn.Module,
    dtype: torch.dtype,
    changed: Mapping[str, Any] | None = None,
    kind: type[nn.Module] | None = None,
) -> nn.Module | None:
    if not compat.is_language_model(model):
        return None
    config: Any = copy.deepcopy(model.config)
    try:
        for name, value in (changed or {}).items():
            setattr(config, name, value)
        with without_values(dtype):
            return (kind or type(model))(config)
    except Exception:  # noqa: BLE001 - a class of the user's own may ask for more than a config, in any way
        return None


@contextmanager
def without_values(dtype: torch.dtype | None = None) -> Iterator[None]:
    """Build models within as a load does, but without values of parameters, which takes almost no memory.

    Buffers stay on the CPU: some classes read values of theirs while they are built.

    Args:
        dtype: torch's default dtype within, None for the present one.
    """
    with torch_default_dtype(dtype), quiet_transformers(), seeded(0), _parameters_on_meta():
        yield


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as soon as it is registered, so its initialisation writes nothing."""
    own = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        moved = None if param is None else nn.Parameter(param.data.to("meta"), requires_grad=param.requires_grad)
        own(self, name, moved)

    with with_attribute(nn.Module, "register_parameter", register):
        yield
