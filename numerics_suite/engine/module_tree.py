"""The modules of a model, listed without a generator for each level: every reference run asks for them, and a tiny model runs faster."""

from __future__ import annotations

from typing import Any

from torch import nn


def names_of(model: nn.Module) -> dict[int, str]:
    """Module id → name, each module once, in the order and by the names of `model.named_modules()`."""
    return {id(module): name for module, name in _walk(model)}


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The modules in the order of `model.modules()`."""
    return [module for module, _ in _walk(model)]


def config_of(module: nn.Module) -> Any:
    """Its config, None without one; a module that lacks an attribute takes long to say so."""
    held = module.__dict__.get("config")
    return getattr(module, "config", None) if held is None and hasattr(type(module), "config") else held


def _walk(model: nn.Module) -> list[tuple[nn.Module, str]]:
    found: dict[int, tuple[nn.Module, str]] = {}
    waiting = [(model, "")]
    while waiting:
        module, name = waiting.pop()
        if id(module) in found:
            continue
        found[id(module)] = module, name
        prefix = f"{name}." if name else ""
        held = module._modules  # noqa: SLF001 - `named_children` makes a generator and a set
        waiting += [(child, prefix + part) for part, child in reversed(held.items()) if child is not None]
    return list(found.values())
