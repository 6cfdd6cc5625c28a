"""Each of the article's defects has a script that fails alone, and that ends well where the defect is not.

The scripts run in processes that cannot import this package. What is lent to them is the model: a folder, or for a model that
a function makes, the file of that function.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from mutants.article_checkpoints import (
    FIVE,
    NOBODY_INITIALISES,
    changed,
    spoiled,
    with_homeless_tensor,
    with_renamed_trunk,
    without_weight,
)
from mutants.driver import release
from unit.script_of import shown
from unit.script_process import ScriptProcess

from numerics_suite.diagnosis.scripts.parts import LONGEST
from numerics_suite.subjects.fixtures import fixture_path

SMALL = {"seq_len": 12, "batch_size": 2}
CLASSIFIER = {"task": "sequence-classification"}
ALLOWED = {"torch", "transformers", "safetensors"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """One of the article's defects.

    Attributes:
        name: of the row.
        check: that finds it.
        cause: of its finding.
        checkpoint: the fixture of which a changed copy is made.
        change: what is changed in the copy; None where the defect is in how it is run.
        factory: the function in `article_models` that makes the model, empty for a checkpoint.
        sound: the same function without the defect.
        cell: precision, task, training plan.
        cure: text of the script, and what stands there without the defect.
    """

    name: str
    check: str
    cause: str
    checkpoint: str = ""
    change: dict[str, Any] | None = None
    factory: str = ""
    sound: str = "sound_model"
    cell: dict[str, Any] = field(default_factory=dict)
    cure: tuple[str, str] | None = None

    def source(self, folder: Path) -> str:
        """The SUBJECT, made below the folder."""
        if self.factory:
            return f"factory:mutants.article_models:{self.factory}"
        if self.change is None:
            return f"fixture:{self.checkpoint}"
        return str(changed(folder / f"{folder.name}-{self.name}", self.checkpoint, **self.change))

    def without(self, script: str, source: str) -> str:
        """The script on what is not damaged."""
        if self.cure is not None:
            assert self.cure[0] in script
            return script.replace(*self.cure)
        if self.factory:
            assert f".{self.factory}()" in script
            return script.replace(f".{self.factory}()", f".{self.sound}()")
        assert repr(source) in script
        return script.replace(repr(source), repr(str(fixture_path(self.checkpoint))))


def of_weights() -> Iterator[Defect]:
    for value in ("nan", "inf", "-inf"):
        yield Defect(
            name=f"weight-{value}",
            check="load.finite",
            cause="corrupt-weights",
            checkpoint="glm-tiny",
            change={"tensors": spoiled(float(value))},
        )
    files: tuple[tuple[str, str, str, Callable[..., object], dict[str, str]], ...] = (
        ("weight-beyond-fp16", "load.finite", "overflow", spoiled(1e5), {"precision": "fp16"}),
        ("weight-missing", "load.complete", "missing-weights", without_weight, {}),
        ("weight-without-a-place", "load.complete", "lost-weights", with_homeless_tensor, {}),
        ("trunk-renamed", "load.complete", "missing-weights", with_renamed_trunk, {}),
    )
    for name, check, cause, tensors, cell in files:
        if name == "trunk-renamed" and release() < (5,):
            continue  # 4.x refuses a checkpoint of which it knows no name
        yield Defect(name=name, check=check, cause=cause, checkpoint="glm-tiny", change={"tensors": tensors}, cell=cell)
    yield Defect(name="untied", check="load.tied", cause="untied-weights", factory="untied")


def of_configs() -> Iterator[Defect]:
    yield Defect(
        name="key-ignored",
        check="load.config",
        cause="ignored-config",
        checkpoint="glm-tiny",
        change={"config": {"use_qk_norm": True}},
        cure=("'use_qk_norm': True,", ""),
    )
    if release() < (5,):
        cure = ("FOLDER = ", "CONFIG.pop('rope_parameters')\nFOLDER = ")
        ignored: dict[str, Any] = {"checkpoint": "glm-tiny", "change": FIVE, "cure": cure}
        yield Defect(name="layout-of-5x", check="load.config", cause="ignored-config", **ignored)
        if release() >= (4, 47):
            yield Defect(name="rotary-base-ignored", check="reference.oracle", cause="semantic-error", **ignored)
    if release() < (4, 47):
        yield Defect(
            name="rotary-factor-ignored",
            check="reference.oracle",
            cause="semantic-error",
            checkpoint="glm-tiny",
            change={"config": {"partial_rotary_factor": 0.25}},
            cure=("'partial_rotary_factor': 0.25", "'partial_rotary_factor': 0.5"),
        )


def of_heads() -> Iterator[Defect]:
    for precision in ("fp32", "bf16", "fp16"):
        cell = {"precision": precision, **CLASSIFIER}
        changes = {
            "uninitialised": {"config": {"legacy_skip_head_init": True}},
            "no-init": {"code": NOBODY_INITIALISES},
        }
        for name, change in changes.items():
            yield Defect(
                name=f"head-{name}-{precision}",
                check="load.head-init",
                cause="uninitialised-parameters",
                checkpoint="chatglm-tiny",
                change=change,
                cell=cell,
            )
    yield Defect(
        name="head-too-large",
        check="load.head-init",
        cause="bad-initialisation",
        checkpoint="chatglm-tiny",
        change={"config": {"initializer_range": 20.0}},
        cell=CLASSIFIER,
    )
    yield Defect(
        name="head-in-fp16",
        check="load.dtype",
        cause="low-precision-section",
        checkpoint="chatglm-tiny-classifier",
        change={"config": {"legacy_head_dtype": "float16"}},
        cell={"precision": "bf16"},
    )


def of_inputs() -> Iterator[Defect]:
    for name in ("ids_through_bf16", "ids_as_floats", "mask_as_floats", "ids_out_of_range"):
        cause = "out-of-range-input" if name == "ids_out_of_range" else "wrong-input-dtype"
        yield Defect(
            name=name.replace("_", "-"),
            check="inputs.pipeline",
            cause=cause,
            factory=name,
            sound="sound",
            cell={"precision": "bf16"},
        )


def of_values() -> Iterator[Defect]:
    rows = (
        ("norm_without_fp32", "reference.local", "low-precision-section", "fp16"),
        ("products_beyond_fp16", "forward.finite", "overflow", "fp16"),
        ("products_beyond_fp16", "forward.headroom", "overflow", "fp16"),
        ("fully_masked_row", "forward.finite", "fully-masked-row", "fp32"),
        ("fully_masked_row", "forward.finite", "fully-masked-row", "bf16"),
        ("zero_by_zero_at_padding", "forward.finite", "invalid-operation", "fp32"),
        ("reciprocal_at_padding", "forward.finite", "invalid-operation", "fp32"),
        ("pooled_padding", "forward.pooling", "wrong-pooling", "fp32"),
        ("detached_branch", "train.grad-flow", "dead-gradient", "fp32"),
        ("gradient_never_finite", "train.amp", "loss-scaling", "amp-fp16"),
        ("gradient_beyond_any_scale", "train.amp", "loss-scaling", "amp-fp16"),
    )
    for factory, check, cause, precision in rows:
        if factory == "fully_masked_row" and release() < (4, 48):
            continue  # attention is no function that could be edited
        yield Defect(
            name=f"{factory.replace('_', '-')}-{check}-{precision}",
            check=check,
            cause=cause,
            factory=factory,
            sound="sound_classifier" if factory == "pooled_padding" else "sound_model",
            cell={"precision": precision, **(SMALL if check == "train.amp" else {})},
        )


def of_training() -> Iterator[Defect]:
    for fixture in ("glm-tiny", "glm-tiny-classifier", "chatglm-tiny-classifier"):
        yield Defect(
            name=f"adamw-in-pure-fp16-{fixture}",
            check="train.finite",
            cause="optimizer-underflow",
            checkpoint=fixture,
            cell={"precision": "pure-fp16"},
            cure=("lr=0.0001", "lr=0.0001, eps=1e-4"),
        )
    yield Defect(
        name="without-clipping",
        check="train.clip",
        cause="divergence",
        checkpoint="glm-tiny",
        cell={"optimizer": "sgd", "lr": 10.0, "steps": 10},
        cure=("lr=10.0", "lr=0.01"),
    )


DEFECTS = [*of_weights(), *of_configs(), *of_heads(), *of_inputs(), *of_values(), *of_training()]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name)
def test_a_script_fails_alone_and_ends_well_without_the_defect(
    defect: Defect, tmp_path: Path, alone: ScriptProcess
) -> None:
    source = defect.source(tmp_path)
    found = shown(source, defect.check, **defect.cell)
    assert found.finding.cause == defect.cause
    assert found.script is not None
    assert len(found.script.splitlines()) < LONGEST
    assert imported(found.script) - set(sys.stdlib_module_names) <= ALLOWED
    ran = alone.run(found.script)
    assert ran.reproduced, f"{ran.said}\n{found.script}"
    ran = alone.run(defect.without(found.script, source))
    assert ran.not_reproduced, f"{ran.said}\n{found.script}"


def imported(script: str) -> set[str]:
    """Roots of what a script imports."""
    found = set()
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found


def test_the_process_of_the_scripts_cannot_import_the_suite(alone: ScriptProcess) -> None:
    ran = alone.run("import numerics_suite")
    assert ran.status == 1
    assert "ModuleNotFoundError" in ran.said
    assert not ran.reproduced
    assert alone.run("print('fine')").status == 0
