"""What benchmarks measure with: a bare training step, all checks of a cell, and processes of their own for both."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from numerics_suite.core.records import Cell
from numerics_suite.devices import random_state
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.request import Request
from numerics_suite.engine.rounded_reference import RoundOnce
from numerics_suite.engine.runner import forward_pass
from numerics_suite.engine.true_fp64 import LiftToFp64
from numerics_suite.inputs.strategies import training_batch
from numerics_suite.settings.options import from_command_line
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.quiet import quiet_transformers
from numerics_suite.subjects.resolve import resolve_all
from numerics_suite.suite.session import SuiteSession

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

STEPS = 3
"""Timed, of which the median counts; one more before them warms up."""

REFERENCES = {"true fp64 passes": LiftToFp64, "rounded passes": RoundOnce}
"""The dispatch mode in which each reference runs a model."""

MEDIUM = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 16384,
    "pad_token_id": 0,
    "eos_token_id": [1],
}
"""A GLM-4 of 35 million parameters."""


def write_model(folder: Path, changes: Mapping[str, Any]) -> str:
    """Save a GLM-4 in bfloat16 with weights of one seed, and give its SUBJECT.

    Args:
        folder: of the checkpoint.
        changes: to :data:`MEDIUM`.
    """
    from transformers import Glm4Config, Glm4ForCausalLM

    with random_state.torch_seeded(0), quiet_transformers():
        Glm4ForCausalLM(Glm4Config(**{**MEDIUM, **changes})).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def default_settings(given: Mapping[str, Any]) -> Settings:
    """The settings of these options of the command line, without what the pyproject.toml around this file asks for."""
    with TemporaryDirectory() as elsewhere:
        return from_command_line(given, Path(elsewhere))


def context_of(precision: str, subject: str = "fixture:glm4-tiny", request: Request | None = None) -> CellContext:
    """The context of one CPU cell under sdpa.

    Args:
        precision: name of the recipe.
        subject: SUBJECT as a user types it.
        request: None for the default batch, 4 rows of at most 64 tokens.
    """
    (resolved,) = resolve_all((subject,), ())
    cell = Cell(subject=resolved.id, precision=precision, attn="sdpa", device="cpu", task=resolved.task)
    return CellContext(resolved, cell, request or Request())


def bare_step(context: CellContext) -> Callable[[], object]:
    """A training step as a plain loop has it: forward, backward, optimizer, nothing looked at.

    Over `--batch-size` rows of `--seq-len` tokens, whatever the effort trains on.
    """
    model = context.copy_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=context.recipe.loss_scaling)
    space = context.space
    tensors = training_batch(space, rows=context.rows, length=space.max_length, seed=0).tensors

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        with forward_pass(context.condition):
            loss = call_model(model, tensors).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step


def alone(function: Callable[..., dict[str, float]], *args: Any) -> dict[str, float]:
    """What the function gives in a process of its own, which ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_gb() -> float:
    """The most memory that this process has held, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


@contextmanager
def cpu_seconds(into: list[float]) -> Iterator[None]:
    """Adds the CPU time of what runs within it to a list."""
    begun = time.process_time()
    yield
    into.append(time.process_time() - begun)


def timed(step: Callable[[], object]) -> list[float]:
    """CPU seconds of some steps."""
    taken: list[float] = []
    for _ in range(STEPS):
        with cpu_seconds(taken):
            step()
    return taken


def steps(subject: str) -> dict[str, float]:
    """A bare step, and one under torch's own search for NaN; memory of the first."""
    torch.set_num_threads(1)
    step = bare_step(context_of("bf16", subject))
    step()
    bare, peak = timed(step), peak_gb()
    with torch.autograd.detect_anomaly():
        searched = timed(step)
    return {"peak_gb": peak, "detect_anomaly": statistics.median(searched) / statistics.median(bare)}


def cell(subject: str, given: Mapping[str, Any] | None = None, request: Request | None = None) -> dict[str, float]:
    """All checks of a bfloat16 cell under sdpa, and each group of them, in bare steps; memory; passes.

    What it takes to import torch and transformers is no part of it: a step needs them too.

    Args:
        subject: SUBJECT as a user types it.
        given: options of the command line besides.
        request: of the batch that the bare step takes.
    """
    torch.set_num_threads(1)
    given = {"subjects": [subject], "precision": "bf16", "attn": "sdpa", **(given or {})}
    session = SuiteSession(default_settings(given))
    groups: defaultdict[str, float] = defaultdict(float)
    with counting_passes() as passes:
        for question in session.plan.questions:
            taken: list[float] = []
            with cpu_seconds(taken):
                result, trace = session.answer(question)
            assert result.status in {"passed", "skipped", "accepted"}, f"{question.id}: {result.reason} {trace}"
            groups[question.check.partition(".")[0]] += sum(taken)
    peak = peak_gb()
    step = bare_step(context_of("bf16", subject, request))
    step()
    unit = statistics.median(timed(step))
    found = {group: seconds / unit for group, seconds in groups.items()}
    return {"cell": sum(found.values()), **found, "peak_gb": peak, "step_s": unit, **passes}


@contextmanager
def counting_passes() -> Iterator[Counter[str]]:
    """Counts whole forward passes, by what they compute: a reference's mode, else the cell's own precision."""
    from transformers import PreTrainedModel

    passes: Counter[str] = Counter()
    inside: list[nn.Module] = []

    def enter(module: nn.Module, _args: object) -> None:
        if not inside and isinstance(module, PreTrainedModel):
            modes = tuple(type(mode) for mode in _get_current_dispatch_mode_stack())
            passes[next((name for name, mode in REFERENCES.items() if mode in modes), "own passes")] += 1
            inside.append(module)

    def leave(module: nn.Module, _args: object, _output: object) -> None:
        if inside and module is inside[0]:
            inside.clear()

    handles = (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
    )
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def show(benchmark: BenchmarkFixture, name: str, figures: Mapping[str, float]) -> None:
    """Into the benchmark's extra info, and onto the terminal."""
    benchmark.extra_info.update(figures)
    print(f"\n{name}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()))


def measure(subject: str) -> dict[str, float]:
    """Figures of one model.

    Args:
        subject: SUBJECT as a user types it.
    """
    step, whole = alone(steps, subject), alone(cell, subject)
    memory = {"peak in steps": whole["peak_gb"] / step["peak_gb"], "step's peak_gb": step["peak_gb"]}
    return {**whole, **memory, "detect_anomaly": step["detect_anomaly"]}
