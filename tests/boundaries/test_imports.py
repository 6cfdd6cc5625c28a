"""Imports point one way: a later stage may import an earlier one, never the reverse; starting up stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from boundaries import source_tree
from boundaries.source_tree import imports_of, modules, outside_imports_of, source_files

import numerics_suite

ORDER = (
    "core",
    "settings",
    "devices",
    "subjects",
    "inputs",
    "engine",
    "definitions",
    "observations",
    "baselines",
    "checks",
    "judgement",
    "diagnosis",
    "training_watch",
    "reports",
    "suite",
    "versions",
    "adoption",
    "extending",
    "plugin",
    "cli",
    "__main__",
)
"""The stages, earliest first."""

LEAVES = frozenset({"numerics_suite.observations.finiteness", "numerics_suite.observations.roundoff"})
"""Plain arithmetic on tensors that `engine` needs too. They import nothing of the package, so nothing runs in a circle."""

LIGHT = ("core", "settings", "extending", "plugin", "cli", "__main__", "numerics_suite")
"""Stages that start without a heavy package: those that `--help` and every pytest run load."""

HEAVY = ("torch", "transformers", "hypothesis", "numpy", "safetensors", "tokenizers", "accelerate", "peft")


def rank(module: str) -> int:
    """Place of the module's stage in the order."""
    return ORDER.index(module.split(".")[1])


def backward_imports(files: tuple[source_tree.SourceFile, ...]) -> list[str]:
    return [
        f"{found.at}: {found.module} imports {found.target}"
        for file in files
        if file.stage != "numerics_suite"
        for found in imports_of(file)
        if found.target != "numerics_suite" and found.target not in LEAVES and rank(found.target) > rank(file.module)
    ]


def test_every_stage_has_its_place() -> None:
    assert {file.stage for file in source_files()} - {"numerics_suite"} <= set(ORDER)


def test_imports_point_to_earlier_stages() -> None:
    assert not backward_imports(source_files())


def test_the_leaves_import_nothing_of_the_package() -> None:
    assert modules() >= LEAVES
    for file in source_files():
        if file.module in LEAVES:
            assert not list(imports_of(file))


def test_a_backward_import_is_seen() -> None:
    text = "from numerics_suite.core import errors\ndef late():\n    from numerics_suite.suite.collector import Gate\n"
    wrong = source_tree.SourceFile(path="wrong.py", module="numerics_suite.engine.wrong", lines=3, tree=ast.parse(text))
    assert backward_imports((wrong,)) == [
        "wrong.py:3: numerics_suite.engine.wrong imports numerics_suite.suite.collector",
    ]


def test_type_checking_imports_do_not_count() -> None:
    text = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from numerics_suite.suite.collector import Gate\n"
    file = source_tree.SourceFile(path="a.py", module="numerics_suite.core.a", lines=3, tree=ast.parse(text))
    assert not list(imports_of(file))


def test_no_two_modules_import_each_other() -> None:
    """Not within a stage either: modules that import each other cannot be read or tested one at a time."""
    graph = {file.module: {found.target for found in imports_of(file)} - {file.module} for file in source_files()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in sorted(graph.get(module, ())):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_light_stages_import_nothing_heavy_at_start() -> None:
    heavy = [
        f"{file.path}: {name}"
        for file in source_files()
        if file.stage in LIGHT
        for name in outside_imports_of(file)
        if name in HEAVY
    ]
    assert not heavy


@pytest.mark.parametrize(
    "program",
    [
        "import numerics_suite, numerics_suite.extending, numerics_suite.plugin, numerics_suite.cli.main",
        "from numerics_suite.cli.main import main; main(['--help'])",
        "from numerics_suite.cli.main import main; main(['check', '--help'])",
    ],
    ids=["import", "help", "check-help"],
)
def test_starting_up_imports_nothing_heavy(program: str, tmp_path: Path) -> None:
    script = "\n".join(
        [
            "import sys",
            "try:",
            f"    {program}",
            "except SystemExit as end:",
            "    assert not end.code, end.code",
            f"heavy = sorted(set({HEAVY!r}) & set(sys.modules))",
            "print('HEAVY', *heavy, file=sys.stderr)",
        ]
    )
    installed = str(Path(numerics_suite.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": installed},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "HEAVY"
