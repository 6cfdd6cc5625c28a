"""A cell's model is gone before the next one is loaded, and kept answers are bounded in bytes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from numerics_suite.cli.main import main
from numerics_suite.engine import cell_context as module
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.load import Loaded
from numerics_suite.suite.session import SuiteSession

FOUR_CELLS = ("fixture:glm4-tiny", "--precision", "fp32,bf16", "--attn", "eager,sdpa", "--max-examples", "1")


def watched_loads(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[torch.nn.Module], object] = lambda _model: None
) -> tuple[list[weakref.ref[Any]], list[int]]:
    """Each model that is loaded from now on, changed so; and how many of those before it were alive then."""
    models: list[weakref.ref[Any]] = []
    alive: list[int] = []
    load = module.load

    def watched(*args: Any, **kwargs: Any) -> Loaded:
        alive.append(sum(model() is not None for model in models))
        loaded = load(*args, **kwargs)
        models.append(weakref.ref(loaded.model))
        change(loaded.model)
        return loaded

    monkeypatch.setattr(module, "load", watched)
    return models, alive


@pytest.mark.slow
def test_no_model_of_an_earlier_cell_is_alive_when_the_next_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the other attention's twin, and the copies of two trips through files, stand beside a cell's own model."""
    _, alive = watched_loads(monkeypatch)
    assert main(["check", *FOUR_CELLS, "--steps", "1", "-n", "0", "--quiet"]) == 0
    assert alive.count(0) == 4
    assert max(alive) <= 2


def test_after_a_finding_of_a_large_model_no_copy_of_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "keeps_gradients", lambda _model: False)  # as for a large model

    def sent_to_infinity(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.get_submodule("model.norm").weight.fill_(1e38)  # type: ignore[operator]

    models, alive = watched_loads(monkeypatch, sent_to_infinity)
    settings = Settings(
        subjects=("fixture:glm4-tiny",), precision=("bf16",), attn=("sdpa",), checks=("forward.finite",)
    )
    session = SuiteSession(settings)
    (question,) = session.plan.questions
    gc.collect()
    gc.disable()
    try:
        result, _ = session.answer(question)
    finally:
        gc.enable()
    assert result.finding is not None
    assert result.finding.remedies
    assert len(models) > 3
    assert max(alive) <= 3  # the cell's own, and a copy of which another is built
    assert sum(model() is not None for model in models) == 1


def test_answers_kept_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    session = SuiteSession(
        Settings(subjects=("fixture:glm4-tiny",), precision=("fp32",), attn=("eager",), device="cpu")
    )
    context = session.context(session.plan.cells[0])
    batch = context.training_batch
    size = sum(value.nbytes for value in context.forward(batch).values())
    monkeypatch.setattr(module, "KEPT_BYTES", 3 * size)
    for shift in range(6):
        ids = (batch.tensors["input_ids"] + shift) % context.vocab_size
        context.forward(type(batch)(tensors={**batch.tensors, "input_ids": ids}, drawn="shifted"))
    kept = [value for outputs in context._forwards.values() for value in outputs.values()]
    assert len(context._forwards) == 3
    assert sum(value.nbytes for value in kept) <= 3 * size
    assert all(isinstance(value, torch.Tensor) for value in kept)
