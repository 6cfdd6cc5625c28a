"""What do other tools cost on the model of :mod:`bench_growth`, in training steps of it?

`pytest -p no:numerics_suite -s benchmarks/bench_neighbours.py`. Each needs what this package does not install, and is skipped without it:

- transformers' own tests of models: the unpacked source distribution of the installed release, named by `TRANSFORMERS_SOURCE`
  (`pip download --no-deps --no-binary :all: transformers==VERSION`), and `pip install parameterized`. It has `ModelTesterMixin`; what
  the repository alone has, tests of generation and of exporters, takes no part;
- msprobe: `pip install mindstudio-probe`. One step in bfloat16 and one in float32 are dumped, and the two dumps are compared.
"""

from __future__ import annotations

import importlib.util
import io
import os
import resource
import statistics
import subprocess
import sys
import types
import unittest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from bench_growth import SMALL
from measurements import MEDIUM, alone, bare_step, context_of, cpu_seconds, show, steps, timed, write_model

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

SOURCE = "TRANSFORMERS_SOURCE"


def common_tests(source: str) -> dict[str, float]:
    """CPU seconds of transformers' common tests of a Glm4 model, and how they ended.

    Args:
        source: the folder of the source distribution.
    """
    torch.set_num_threads(1)
    sys.path.insert(0, source)
    for name, mixin in (
        ("generation.test_utils", "GenerationTesterMixin"),
        ("exporters.test_export", "ExportTesterMixin"),
    ):
        if not Path(source, "tests", *name.split(".")).with_suffix(".py").is_file():
            module = types.ModuleType(f"tests.{name}")
            setattr(module, mixin, type(mixin, (), {}))
            sys.modules[f"tests.{name.partition('.')[0]}"] = types.ModuleType(f"tests.{name.partition('.')[0]}")
            sys.modules[f"tests.{name}"] = module
    from tests.test_modeling_common import ModelTesterMixin, ids_tensor
    from transformers import Glm4Config, Glm4ForCausalLM, Glm4Model

    class ModelTester:
        batch_size, seq_length, is_training = 4, 64, True

        def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
            ids = ids_tensor([self.batch_size, self.seq_length], SMALL["vocab_size"])
            # As in transformers' own tester: some tests take one and a half times as many tokens.
            return Glm4Config(**{**MEDIUM, **SMALL}, max_position_embeddings=512), {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
            }

    class ModelTest(ModelTesterMixin, unittest.TestCase):
        all_model_classes = (Glm4Model, Glm4ForCausalLM)

        def setUp(self) -> None:
            self.model_tester = ModelTester()

    taken: list[float] = []
    with cpu_seconds(taken):
        ran = unittest.TextTestRunner(stream=io.StringIO()).run(
            unittest.defaultTestLoader.loadTestsFromTestCase(ModelTest)
        )
    bad = len(ran.failures) + len(ran.errors)
    return {"seconds": sum(taken), "tests": ran.testsRun, "skipped": len(ran.skipped), "failed": bad}


def bare_seconds(subject: str) -> dict[str, float]:
    """CPU seconds of a bare bfloat16 step."""
    torch.set_num_threads(1)
    step = bare_step(context_of("bf16", subject))
    step()
    return {"seconds": statistics.median(timed(step))}


def dumped(subject: str, precision: str, task: str, folder: str) -> dict[str, float]:
    """CPU seconds of a bare step, and of one whose ops msprobe dumps.

    Args:
        subject: SUBJECT as a user types it.
        precision: name of the recipe.
        task: of msprobe: `statistics` or `tensor`.
        folder: for the dump.
    """
    torch.set_num_threads(1)
    from msprobe.pytorch import PrecisionDebugger

    step = bare_step(context_of(precision, subject))
    step()
    bare, taken = statistics.median(timed(step)), []
    debugger = PrecisionDebugger(task=task, dump_path=folder, level="L1")
    with cpu_seconds(taken):
        debugger.start()
        step()
        debugger.stop()
        debugger.step()
    return {"bare": bare, "dump": sum(taken)}


def compared(target: Path, golden: Path, out: Path) -> float:
    """CPU seconds of msprobe's comparison of two dumps, without what it takes to start."""
    command = [sys.executable, "-m", "msprobe.msprobe", "compare"]
    start, whole = (
        children_seconds([*command, *arguments])
        for arguments in (["--help"], ["-tp", str(target), "-gp", str(golden), "-o", str(out)])
    )
    return whole - start


def children_seconds(command: list[str]) -> float:
    """CPU seconds of a program."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)  # noqa: S603 - our own command
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.fixture
def subject(tmp_path: Path) -> str:
    """A GLM-4 of 5 million parameters."""
    return write_model(tmp_path / "small", SMALL)


def test_detect_anomaly(benchmark: BenchmarkFixture, subject: str) -> None:
    """A step under `torch.autograd.detect_anomaly()`, over a bare one."""
    show(benchmark, "detect_anomaly", benchmark.pedantic(alone, args=(steps, subject), rounds=1))


@pytest.mark.skipif(SOURCE not in os.environ, reason=f"{SOURCE} names no source distribution of transformers")
def test_transformers_own_tests(benchmark: BenchmarkFixture, subject: str) -> None:
    """`ModelTesterMixin` over the same model, over a bare step."""
    found = benchmark.pedantic(alone, args=(common_tests, os.environ.get(SOURCE)), rounds=1)
    show(benchmark, "own tests", {**found, "steps": found["seconds"] / alone(bare_seconds, subject)["seconds"]})
    assert found["tests"] > found["skipped"] + found["failed"]


@pytest.mark.skipif(importlib.util.find_spec("msprobe") is None, reason="msprobe is not installed")
@pytest.mark.parametrize("task", ["statistics", "tensor"])
def test_msprobe(benchmark: BenchmarkFixture, subject: str, tmp_path: Path, task: str) -> None:
    """Two dumps of one step and their comparison, over bare steps of bfloat16."""

    def whole() -> dict[str, float]:
        first, second = (
            alone(dumped, subject, precision, task, str(tmp_path / precision)) for precision in ("bf16", "fp32")
        )
        dumps = [next((tmp_path / precision).glob("step*/*/dump.json")) for precision in ("bf16", "fp32")]
        comparison = compared(dumps[0].parent.parent, dumps[1].parent.parent, tmp_path / "out")
        size = sum(path.stat().st_size for path in (tmp_path / "bf16").rglob("*") if path.is_file())
        unit = first["bare"]
        return {
            "dump": first["dump"] / unit,
            "dump of float32": second["dump"] / unit,
            "comparison": comparison / unit,
            "dump_mb": size / 1e6,
        }

    show(benchmark, f"msprobe {task}", benchmark.pedantic(whole, rounds=1))
    assert list((tmp_path / "out").iterdir())
