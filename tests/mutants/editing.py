"""Changing one place of a model that is already loaded: a line of a method, a function that it calls, an attribute.

A module under change gets a class of its own, derived from its class under the same name, so that the change survives
`copy.deepcopy`, hooks, checkpointing and saving, and no other module (nor the installed package) is touched.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

from torch import nn

Patch = Callable[[nn.Module], None]


class NoSuchPlaceError(Exception):
    """The installed release has no such line, so the mutant cannot be made of it."""


def on(path: str, change: Callable[[Any], None]) -> Patch:
    """A patch that calls `change` with the module of that path."""

    def patch(model: nn.Module) -> None:
        change(model.get_submodule(path))

    return patch


def edited(path: str, name: str, old: str, new: str, *, which: int | None = None) -> Patch:
    """A patch that replaces text in a method of the module at `path`, or in a function of its file.

    Args:
        path: of the module; "" is the model itself.
        name: of the method or of the module-level function.
        old: text of the source; found exactly once unless `which` says which of them is meant.
        new: what stands there afterwards.
        which: index from 0 among several.
    """
    return on(path, lambda module: edit(module, name, old, new, which=which))


def overridden(path: str, **methods: Callable[..., Any]) -> Patch:
    """A patch that gives the module at `path` other methods; each is called with the class's own first.

    Args:
        path: of the module.
        methods: `forward=lambda own, self, *args, **kwargs: …`, with `own` the method as it was, unbound.
    """
    return on(path, lambda module: override(module, **methods))


def override(module: nn.Module, **methods: Callable[..., Any]) -> None:
    """See :func:`overridden`."""
    kind = type(module)

    def bound(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        own = getattr(kind, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return method(own, self, *args, **kwargs)

        return call

    _rebase(module, {name: bound(name, method) for name, method in methods.items()})


def edit(module: nn.Module, name: str, old: str, new: str, *, which: int | None = None) -> None:
    """See :func:`edited`.

    Raises:
        NoSuchPlaceError: the source of this release has no such text.
    """
    kind = type(module)
    method = getattr(kind, name, None)
    if method is not None:
        function = inspect.unwrap(method)
        names = dict(function.__globals__)
        _rebase(module, {name: _compiled(function, old, new, which, names)})
        return
    forward = inspect.unwrap(kind.forward)
    names = dict(forward.__globals__)
    function = names.get(name)
    if not isinstance(function, FunctionType):
        message = f"{kind.__name__} and its file have no {name}"
        raise NoSuchPlaceError(message)
    # Every function of the file is made to look names up in the copy, so that callers find the changed one.
    for key, value in list(names.items()):
        if isinstance(value, FunctionType) and value.__module__ == function.__module__:
            names[key] = _with_globals(value, names)
    names[name] = _compiled(function, old, new, which, names)
    _rebase(module, {key: _with_globals(value, names) for key, value in _own_methods(kind).items()})


def _own_methods(kind: type) -> dict[str, FunctionType]:
    """The methods of the model's own file that look names up there: undecorated ones and what decorators wrap."""
    home = inspect.unwrap(kind.forward).__globals__
    found: dict[str, FunctionType] = {}
    for base in reversed(kind.__mro__):
        for name, value in vars(base).items():
            if isinstance(value, FunctionType) and inspect.unwrap(value).__globals__ is home and name != "__init__":
                found[name] = inspect.unwrap(value)
    return found


def _with_globals(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__module__ = function.__module__
    copy.__qualname__ = function.__qualname__
    return copy


def _compiled(function: FunctionType, old: str, new: str, which: int | None, names: dict[str, Any]) -> Any:
    lines, first = inspect.getsourcelines(function)
    source = "".join(lines)
    count = source.count(old)
    if count == 0 or (which is None and count != 1) or (which is not None and which >= count):
        message = f"{function.__qualname__} has {count} times: {old}"
        raise NoSuchPlaceError(message)
    pieces = source.split(old)
    cut = (which or 0) + 1
    source = old.join(pieces[:cut]) + new + old.join(pieces[cut:])
    tree = ast.parse(textwrap.dedent(source))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    # Documentation made by a decorator is of no use here, and it asks for the class that the function stands in.
    definition.decorator_list = [item for item in definition.decorator_list if "docstring" not in ast.dump(item)]
    ast.increment_lineno(tree, first - 1)
    code = compile(
        tree, inspect.getfile(function), "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True
    )
    made: dict[str, Any] = {}
    exec(code, names, made)
    return made[definition.name]


def _rebase(module: nn.Module, members: dict[str, Any]) -> None:
    """Give the module a class of its own with these members."""
    kind = type(module)
    own = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    module.__class__ = type(kind.__name__, (kind,), own | members)  # type: ignore[assignment]


def other_loss(loss: Callable[..., Any]) -> Patch:
    """A patch for transformers' own models: their loss becomes `loss(own, **the keywords of the call)`."""

    def patch(model: nn.Module) -> None:
        kind: Any = type(model)

        def chosen(self: Any) -> Any:
            own = kind.loss_function.fget(self)

            def call(*args: Any, **kwargs: Any) -> Any:
                # Before 4.49 logits, labels and the vocabulary's size are handed over by position.
                return loss(own, **dict(zip(("logits", "labels", "vocab_size"), args, strict=False)), **kwargs)

            return call

        _rebase(model, {"loss_function": property(chosen)})

    return patch
