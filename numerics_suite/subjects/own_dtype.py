"""Finds the line of a checkpoint's own code that fixes a parameter's dtype, and code that follows the requested one."""

from __future__ import annotations

import ast
import inspect
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from numerics_suite.subjects.built_model import built_dtypes
from numerics_suite.subjects.remote_code import is_a_checkpoints

OF_CONFIG, OF_TORCH = "config.torch_dtype", "torch.get_default_dtype()"
"""Expressions that give the requested dtype in such code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedDtype:
    """A keyword `dtype=` with a constant.

    Attributes:
        file: name of the file.
        line: in it, from 1.
        column: of the constant in that line, in UTF-8 bytes as `ast` counts.
        constant: as it is written, such as `torch.half`.
        instead: code that follows the requested dtype.
    """

    file: str
    line: int
    column: int
    constant: str
    instead: str

    def __str__(self) -> str:
        """The edit, such as `write dtype=config.torch_dtype for dtype=torch.half at modeling_chatglm.py:1219`."""
        return f"write dtype={self.instead} for dtype={self.constant} at {self.file}:{self.line}"

    def applied(self, source: str) -> str:
        """The source with the constant replaced.

        Args:
            source: of the file.
        """
        lines = source.splitlines(keepends=True)
        line = lines[self.line - 1].encode()
        end = self.column + len(self.constant.encode())
        lines[self.line - 1] = (line[: self.column] + self.instead.encode() + line[end:]).decode()
        return "".join(lines)


def named_dtypes(model: nn.Module, names: Sequence[str], dtype: torch.dtype) -> tuple[NamedDtype, ...]:
    """Where the checkpoint's own code fixes the dtype of these parameters; empty unless the change helps all.

    The model's class is built once more from the changed source, its parameters on the meta device, to verify this.

    Args:
        model: of transformers, without an adapter.
        names: of parameters that its class builds in another dtype.
        dtype: the requested one.
    """
    kind = type(model)
    if not is_a_checkpoints(kind):
        return ()
    source = Path(inspect.getfile(kind)).read_text(encoding="utf-8")
    found = dict.fromkeys(place for name in names for place in _places(model, name, source))
    # Last line first, so that none moves another.
    changed = source
    for place in sorted(found, key=lambda place: (place.line, place.column), reverse=True):
        changed = place.applied(changed)
    built = _dtypes_of(changed, model, dtype) if found else {}
    return tuple(found) if built and all(built.get(name) == dtype for name in names) else ()


def _places(model: nn.Module, name: str, source: str) -> Iterator[NamedDtype]:
    """The assignment to `self` of the module that holds the parameter, in the class that holds the module."""
    owner, _, module = name.rpartition(".")[0].rpartition(".")
    kind = type(model.get_submodule(owner))
    if kind.__module__ != type(model).__module__:
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name in {each.__name__ for each in kind.__mro__}:
            for assigned in ast.walk(node):
                if isinstance(assigned, ast.Assign) and any(_is_of_self(target, module) for target in assigned.targets):
                    yield from _constants(assigned.value, Path(inspect.getfile(kind)).name, source)


def _is_of_self(target: ast.expr, name: str) -> bool:
    return isinstance(target, ast.Attribute) and target.attr == name and ast.unparse(target.value) == "self"


def _constants(value: ast.expr, file: str, source: str) -> Iterator[NamedDtype]:
    instead = OF_CONFIG if OF_CONFIG in source else OF_TORCH
    for keyword in (node for node in ast.walk(value) if isinstance(node, ast.keyword) and node.arg == "dtype"):
        written = ast.get_source_segment(source, keyword.value) or ""
        of_torch, _, constant = written.partition(".")
        if of_torch == "torch" and isinstance(getattr(torch, constant, None), torch.dtype):
            line, column = keyword.value.lineno, keyword.value.col_offset
            yield NamedDtype(file=file, line=line, column=column, constant=written, instead=instead)


def _dtypes_of(source: str, model: nn.Module, dtype: torch.dtype) -> Mapping[str, torch.dtype]:
    """The dtypes in which the changed class builds its parameters for a config that names the dtype, as a saved one does."""
    own = sys.modules[type(model).__module__]
    module = types.ModuleType(f"{own.__name__}_changed")
    module.__package__, module.__file__ = own.__package__, own.__file__
    try:
        exec(compile(source, str(own.__file__), "exec"), vars(module))  # noqa: S102 - the checkpoint's own code, trusted and loaded already
    except Exception:  # noqa: BLE001 - code of others, which may refuse to be run a second time
        return {}
    kind = getattr(module, type(model).__name__, None)
    return {} if kind is None else built_dtypes(model, dtype, kind=kind, changed={"torch_dtype": dtype})
