"""The modules of a model, listed without a generator for each level: every reference run asks for them, and a tiny model runs faster."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def names_of(model: nn.Module) -> dict[int, str]:
    """Module id → name, each module once, in the order and by the names of `model.named_modules()`."""
    found: dict[int, str] = {}
    _name(model, "", found)
    return found


def _name(module: nn.Module, name: str, found: dict[int, str]) -> None:
    if id(module) not in found:
        found[id(module)] = name
        prefix = f"{name}." if name else ""
        for part, child in module._modules.items():  # noqa: SLF001 - `named_children` makes a generator and a set
            if child is not None:
                _name(child, prefix + part, found)


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The modules in the order of `model.modules()`."""
    found: dict[int, nn.Module] = {}
    waiting: list[nn.Module | None] = [model]
    while waiting:
        module = waiting.pop()
        if module is not None and id(module) not in found:
            found[id(module)] = module
            if module._modules:  # noqa: SLF001 - as above
                waiting.extend(reversed(module._modules.values()))  # noqa: SLF001
    return list(found.values())


def config_of(module: nn.Module) -> Any:
    """Its config, None without one; a module that lacks an attribute takes long to say so."""
    held = module.__dict__.get("config")
    return getattr(module, "config", None) if held is None and hasattr(type(module), "config") else held


def configs_of(modules: Iterable[nn.Module]) -> list[Any]:
    """The configs of these modules, each once."""
    found = map(config_of, modules)
    return list({id(config): config for config in found if config is not None}.values())
