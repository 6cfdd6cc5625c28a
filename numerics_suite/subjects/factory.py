"""A user's own callable that returns a module, or a module and a batch."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from numerics_suite.core.errors import BadInputError, CheckError, nearest
from numerics_suite.core.interrupts import stop_if_requested
from numerics_suite.subjects.quiet import quiet_transformers

if TYPE_CHECKING:
    from torch import nn

PREFIX = "factory:"


def find_factory(source: str) -> Callable[[], Any]:
    """The callable that `factory:module:function` names; the module may lie in the working directory.

    Raises:
        BadInputError: the text is malformed, the module cannot be imported, or it has no such callable.
        CheckError: the module ends the process.
    """
    module_name, _, name = source.removeprefix(PREFIX).partition(":")
    if not module_name or not name:
        message = f"'{source}' must have the form factory:module:function"
        raise BadInputError(message)
    # The path stays: the user's module may import its neighbours later.
    if os.getcwd() not in sys.path and "" not in sys.path:  # noqa: PTH109  # sys.path holds text
        sys.path.insert(0, os.getcwd())  # noqa: PTH109
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # noqa: BLE001  # the user's module may raise anything
        message = f"{source}: module {module_name} cannot be imported: {_text(error)}"
        raise BadInputError(message) from None
    except (SystemExit, KeyboardInterrupt) as error:
        raise _ended(source, error) from None
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        functions = [key for key, value in vars(module).items() if callable(value)]
        message = f"{source}: {module_name} has no callable '{name}'{nearest(name, functions)}"
        raise BadInputError(message)
    factory: Callable[[], Any] = found
    return factory


def call_factory(source: str) -> tuple[nn.Module, dict[str, Any] | None]:
    """A fresh module, and the batch that came with it.

    Raises:
        BadInputError: the call fails or returns something else.
        CheckError: the call ends the process.
    """
    from torch import nn

    from numerics_suite.devices.memory import reraise_if_fatal

    factory = find_factory(source)
    # Only where it is in use already: a plain module needs no transformers.
    quiet = quiet_transformers() if "transformers" in sys.modules else contextlib.nullcontext()
    try:
        with quiet:
            made = factory()
    except Exception as error:  # noqa: BLE001  # the user's function may raise anything
        reraise_if_fatal(error)
        message = f"{source} raised {_text(error)}"
        raise BadInputError(message) from None
    except (SystemExit, KeyboardInterrupt) as error:
        raise _ended(source, error) from None
    module, batch = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(module, nn.Module):
        message = f"{source} returned {_kind(made)}; return an nn.Module or a pair (module, batch)"
        raise BadInputError(message)
    if batch is None:
        return module, None
    if not isinstance(batch, Mapping) or not all(isinstance(name, str) for name in batch):
        message = f"{source}: the batch is {_kind(batch)}; return a dict of tensors by name"
        raise BadInputError(message)
    return module, dict(batch)


def _ended(source: str, error: BaseException) -> CheckError:
    """The error for a factory that ends the process instead of returning; a user's interrupt stays an interrupt."""
    stop_if_requested()
    what = f"sys.exit({error.code!r})" if isinstance(error, SystemExit) else type(error).__name__
    return CheckError(f"{source} returned no module: its code ended the process with {what}")


def _text(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeio" else f"a {name}"
