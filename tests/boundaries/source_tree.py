"""The package's own source as syntax trees, read once; what the boundary tests look at."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "numerics_suite"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of the package: its path from the repository's root, dotted module name, lines and tree."""

    path: str
    module: str
    lines: int
    tree: ast.Module

    @property
    def stage(self) -> str:
        """`engine` of `numerics_suite.engine.runner`; the package's own name for its `__init__`."""
        return self.module.split(".")[1] if "." in self.module else self.module


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One import of a module of the package, outside `if TYPE_CHECKING`."""

    at: str
    module: str
    target: str
    on_start: bool
    """At module level; False inside a function."""


@cache
def source_files() -> tuple[SourceFile, ...]:
    """Every Python file of the package."""
    return tuple(_read(path) for path in sorted(PACKAGE.rglob("*.py")))


def _read(path: Path) -> SourceFile:
    text = path.read_text(encoding="utf-8")
    parts = path.relative_to(ROOT).with_suffix("").parts
    return SourceFile(
        path=path.relative_to(ROOT).as_posix(),
        module=".".join(parts[:-1] if parts[-1] == "__init__" else parts),
        lines=len(text.splitlines()),
        tree=ast.parse(text),
    )


@cache
def modules() -> frozenset[str]:
    """Dotted names of every module of the package."""
    return frozenset(file.module for file in source_files())


def imports_of(file: SourceFile) -> Iterator[Import]:
    """The imports of the package's own modules in one file; `from package import submodule` names the submodule."""
    for node, on_start in _statements(file.tree, on_start=True):
        for target in _targets(node):
            if target == "numerics_suite" or target.startswith("numerics_suite."):
                yield Import(at=f"{file.path}:{node.lineno}", module=file.module, target=target, on_start=on_start)


def outside_imports_of(file: SourceFile) -> Iterator[str]:
    """Top-level names of the other packages that importing the file imports."""
    for node, on_start in _statements(file.tree, on_start=True):
        if on_start:
            yield from (target.partition(".")[0] for target in _targets(node))


def _targets(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0, f"line {node.lineno}: a relative import hides what it imports"
    assert node.module is not None
    for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        yield whole if whole in modules() else node.module


def _statements(node: ast.AST, *, on_start: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, on_start
        elif isinstance(child, ast.If) and ast.unparse(child.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            for other in child.orelse:
                yield from _statements(other, on_start=on_start)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _statements(child, on_start=on_start and not inside)


def functions_of(tree: ast.AST, *, public: bool = False) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods, nested ones too; with `public` those that a user can reach by public names."""
    for child in ast.iter_child_nodes(tree):
        if public and getattr(child, "name", "").startswith("_"):
            continue
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
            if public:
                continue
        yield from functions_of(child, public=public)
