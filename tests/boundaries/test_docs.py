"""Every public name says what it is, and every function what it returns."""

from __future__ import annotations

import ast

from boundaries.source_tree import functions_of, source_files


def test_every_module_is_documented() -> None:
    assert not [file.path for file in source_files() if not ast.get_docstring(file.tree)]


def test_every_public_class_is_documented() -> None:
    missing = [
        f"{file.path}:{node.lineno} {node.name}"
        for file in source_files()
        for node in ast.walk(file.tree)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not missing


def test_every_public_function_is_documented() -> None:
    missing = [
        f"{file.path}:{node.lineno} {node.name}"
        for file in source_files()
        for node in functions_of(file.tree, public=True)
        if not ast.get_docstring(node)
    ]
    assert not missing


def test_every_return_is_annotated() -> None:
    missing = [
        f"{file.path}:{node.lineno} {node.name}"
        for file in source_files()
        for node in functions_of(file.tree)
        if node.returns is None
    ]
    assert not missing


def test_documentation_has_no_empty_first_line() -> None:
    wrong = [
        f"{file.path}:{node.lineno} {node.name}"
        for file in source_files()
        for node in functions_of(file.tree)
        if (text := ast.get_docstring(node, clean=False)) is not None and not text.split("\n", 1)[0].strip()
    ]
    assert not wrong
