"""What does the harness add to the bare model work that the same checks need?

A first run of the cell's checks is recorded: every load, whole forward pass, backward pass and optimizer step. Then the
checks and a bare replay of exactly that work are timed by turns in one process, in CPU time, and the best of each is divided. The
replay has no Hypothesis, no comparison, no watching, no copies and no twins: a pass that ran under a float64 or rounded
twin is replayed as a plain one, so the ratio of all checks shows what the twins cost.
"""

from __future__ import annotations

import contextlib
import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from measurements import default_settings, show
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from numerics_suite.core.records import CheckResult
from numerics_suite.engine.outputs import loss_in
from numerics_suite.subjects.quiet import quiet_transformers
from numerics_suite.suite.session import SuiteSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_benchmark.fixture import BenchmarkFixture

ROUNDS = 10
WITHOUT_TWINS = ("load.*", "inputs.*", "forward.finite", "forward.headroom", "forward.deterministic", "train.*")
TWINS = (
    "load.roundtrip",
    "inputs.pipeline",
    "train.accumulation",
    "train.checkpointing",
    "train.labels",
    "train.trainer",
)
"""Checks of these groups that run twins all the same."""

MOST_RATIO = 1.5
"""Allowed for the checks without twins."""


@dataclass(slots=True)
class ModelCall:
    """One forward pass of a whole model."""

    kwargs: dict[str, Any]
    gradients: bool
    training: bool
    autocast: torch.dtype | None
    twin: bool


@dataclass(slots=True)
class Work:
    """The model work of a run, in its order: calls, `"backward"`, `"step"`, and loads."""

    model: nn.Module
    steps: list[Any] = field(default_factory=list)

    def count(self, kind: object) -> int:
        """How many of a kind: a class, `"backward"` or `"step"`."""
        if isinstance(kind, str):
            return sum(step == kind for step in self.steps if isinstance(step, str))
        assert isinstance(kind, type)
        return sum(isinstance(step, kind) for step in self.steps)


@dataclass(slots=True)
class Load:
    """One `from_pretrained` of a model class."""

    cls: Any
    path: Any
    kwargs: dict[str, Any]


class Recorder:
    """Notes the work while it is done."""

    def __init__(self, work: Work) -> None:
        """Nothing is inside a call yet."""
        self.work = work
        self.depth = 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Watch module calls, backward passes, optimizer steps and loads of this process; restored on exit."""
        from transformers import PreTrainedModel

        call, load = nn.Module.__call__, PreTrainedModel.__dict__["from_pretrained"]
        backward, grad = torch.autograd.backward, torch.autograd.grad
        handle = register_optimizer_step_post_hook(lambda *_: self._note("step"))
        nn.Module.__call__ = self._watched(call)
        PreTrainedModel.from_pretrained = classmethod(self._loader(load.__func__))
        torch.autograd.backward = self._noting(backward)
        torch.autograd.grad = self._noting(grad)
        try:
            yield
        finally:
            handle.remove()
            nn.Module.__call__ = call
            PreTrainedModel.from_pretrained = load
            torch.autograd.backward, torch.autograd.grad = backward, grad

    def _note(self, what: object) -> None:
        self.work.steps.append(what)

    def _noting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self._note("backward")
            return function(*args, **kwargs)

        return noted

    def _loader(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(cls: Any, path: Any, *args: Any, **kwargs: Any) -> Any:
            self._note(Load(cls=cls, path=path, kwargs=dict(kwargs)))
            return function(cls, path, *args, **kwargs)

        return loaded

    def _watched(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self.depth == 0 and type(module) is type(self.work.model) and not args:
                self._note(_call(module, kwargs))
            self.depth += 1
            try:
                return function(module, *args, **kwargs)
            finally:
                self.depth -= 1

        return watched


def _call(module: nn.Module, kwargs: dict[str, Any]) -> ModelCall:
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    kept = {
        name: value.clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in kwargs.items()
    }
    return ModelCall(
        kwargs=kept,
        gradients=torch.is_grad_enabled(),
        training=module.training,
        autocast=torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None,
        twin=bool(_get_current_dispatch_mode_stack()),
    )


def replay(work: Work, path: Path) -> None:
    """Do the same loads, passes and steps with plain torch.

    Args:
        work: as recorded.
        path: the checkpoint, in place of temporary copies that are gone.
    """
    model = work.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    output: Any = None
    for step in work.steps:
        if isinstance(step, Load):
            step.cls.from_pretrained(step.path if Path(str(step.path)).exists() else path, **step.kwargs)
        elif isinstance(step, ModelCall):
            output = _replay_call(model, step)
        elif step == "backward" and output is not None:
            optimizer.zero_grad(set_to_none=True)
            loss = loss_in(dict(output))
            if loss.requires_grad:  # the oracle's own backward pass is no work of the model
                loss.backward()
            output = None
        elif step == "step":
            optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _replay_call(model: nn.Module, call: ModelCall) -> Any:
    model.train(call.training)
    kwargs = {name: value if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in call.kwargs.items()}
    for name, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point() and name != "attention_mask":
            kwargs[name] = value.to(next(model.parameters()).dtype)
    autocast = torch.autocast("cpu", dtype=call.autocast) if call.autocast else contextlib.nullcontext()
    with torch.set_grad_enabled(call.gradients), autocast:
        try:
            return model(**kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return None  # a wrong dtype that a check tries is refused here as it was there


def run_checks(
    precision: str, checks: tuple[str, ...], skip: tuple[str, ...]
) -> tuple[SuiteSession, list[CheckResult]]:
    """Ask the checks of glm4-tiny at a precision in this process.

    Args:
        precision: name of the recipe.
        checks: globs, empty for all.
        skip: globs.
    """
    given = {"subjects": ["fixture:glm4-tiny"], "precision": precision, "attn": "sdpa"}
    if checks:
        given["checks"] = ",".join(checks)
    if skip:
        given["skip"] = ",".join(skip)
    session = SuiteSession(default_settings(given))
    return session, [session.answer(question)[0] for question in session.plan.questions]


def measure(precision: str, checks: tuple[str, ...], skip: tuple[str, ...]) -> dict[str, float]:
    """Best seconds of the checks and of their bare work over interleaved rounds, and what the work was.

    Args:
        precision: name of the recipe.
        checks: globs, empty for all.
        skip: globs.
    """
    session, results = run_checks(precision, checks, skip)
    assert not [result for result in results if result.status in {"failed", "error"}]
    subject = next(iter(session.plan.subjects.values()))
    assert subject.path is not None
    work = Work(model=session.context(session.plan.cells[0]).load().model)
    with Recorder(work).recording():
        run_checks(precision, checks, skip)
    seconds: dict[str, list[float]] = {"harness": [], "bare": []}
    for _ in range(ROUNDS):
        start = time.process_time()
        run_checks(precision, checks, skip)
        middle = time.process_time()
        with quiet_transformers():
            replay(work, subject.path)
        seconds["bare"].append(time.process_time() - middle)
        seconds["harness"].append(middle - start)
    best = {name: min(values) for name, values in seconds.items()}
    counts = {"loads": work.count(Load), "passes": work.count(ModelCall), "backward": work.count("backward")}
    twins = sum(isinstance(step, ModelCall) and step.twin for step in work.steps)
    return {**best, "ratio": best["harness"] / best["bare"], **counts, "steps": work.count("step"), "twins": twins}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-bf16"])
@pytest.mark.parametrize("which", ["without-twins", "all"])
def test_overhead(benchmark: BenchmarkFixture, precision: str, which: str) -> None:
    """The ratio is in the benchmark's extra info; that of the checks without twins must stay below its limit."""
    checks, skip = (WITHOUT_TWINS, TWINS) if which == "without-twins" else ((), ())
    found = benchmark.pedantic(measure, args=(precision, checks, skip), rounds=1)
    show(benchmark, f"{which} {precision}", found)
    if which == "without-twins":
        assert found["twins"] == 0
        assert found["ratio"] <= MOST_RATIO
