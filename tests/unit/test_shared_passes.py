"""A pass runs once: checks of a cell read one answer, and cells that are the same in true fp64 share theirs."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from numerics_suite.checks import _true_gradient
from numerics_suite.checks._laws import law_measurements
from numerics_suite.checks.forward.attention import _other, attention
from numerics_suite.checks.forward.batch import batch as batch_law
from numerics_suite.checks.forward.cache import cache
from numerics_suite.checks.forward.causal import causal
from numerics_suite.checks.forward.padding import padding
from numerics_suite.checks.reference.gradient import gradient
from numerics_suite.checks.reference.oracle import oracle
from numerics_suite.checks.train._other_ways import agreement
from numerics_suite.checks.train.accumulation import accumulation
from numerics_suite.checks.train.checkpointing import checkpointing
from numerics_suite.checks.train.clip import clip
from numerics_suite.core.errors import UnsupportedError
from numerics_suite.core.exact import AGREED
from numerics_suite.core.registry import CheckSpec
from numerics_suite.engine import cell_context, runner
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.pass_store import PassStore
from numerics_suite.engine.references import compare_law, plain_answer, rounded_answer, true_answer
from numerics_suite.engine.training_loop import Trainer
from numerics_suite.engine.true_passes import TruePasses
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.load import Loaded
from numerics_suite.suite.driver import ask
from numerics_suite.suite.session import SuiteSession


def cells(
    effort: str = "quick",
    precision: tuple[str, ...] = ("bf16",),
    attn: tuple[str, ...] = ("sdpa",),
    subjects: tuple[str, ...] = ("fixture:glm4-tiny",),
    **changes: Any,
) -> list[CellContext]:
    settings = Settings(subjects=subjects, precision=precision, attn=attn, device="cpu", effort=effort, **changes)
    session = SuiteSession(settings)
    shared = TruePasses()
    return [
        CellContext(
            session.plan.subjects[cell.subject],
            cell,
            session._request(session.plan.subjects[cell.subject], cell),
            shared=shared,
        )
        for cell in session.plan.cells
    ]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each reference runs."""
    counts: Counter[str] = Counter()
    for name in ("run_true_fp64", "run_rounded"):
        inner = getattr(runner, name)

        def counted(*args: Any, inner: Any = inner, name: str = name, **kwargs: Any) -> Any:
            counts[name + (" gradients" if kwargs.get("gradients") else "")] += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(runner, name, counted)
    return counts


def test_the_passes_of_an_earlier_subject_are_gone_without_a_collection() -> None:
    """Between two cells what lives is set aside from collections (`core/garbage.py`)."""
    eager, sdpa, next_one, _ = cells(attn=("eager", "sdpa"), subjects=("fixture:glm4-tiny", "fixture:glm-tiny"))
    stores = [weakref.ref(context.true_passes.answers) for context in (eager, sdpa)]
    assert sdpa.true_passes.first is eager.true_passes
    eager.release()
    sdpa.release()
    gc.disable()
    try:
        assert all(store() is not None for store in stores)
        assert next_one.true_passes.first is None
        assert [store() for store in stores] == [None, None]
    finally:
        gc.enable()


def test_a_law_whose_batches_are_there_adds_no_pass(ran: Counter[str]) -> None:
    (context,) = cells()
    ask(causal, context, seed=0)
    before = dict(ran)
    assert before["run_rounded"] == 2

    def unchanged(context: CellContext, batch: Any) -> Any:
        """Is the answer the answer?"""
        true = true_answer(context, batch.tensors)
        found = compare_law(
            context,
            true=true,
            true_other=true,
            other=plain_answer(context, batch.tensors),
            base=lambda: rounded_answer(context, batch.tensors),
        )
        yield from law_measurements(*found)

    outcome = ask(CheckSpec(id="forward.causal", function=unchanged, batches=True), context, seed=0)
    assert outcome.examples == 2
    assert not outcome.breaches
    assert outcome.worst["rounded"].value > 0
    assert dict(ran) == before


def test_one_float64_gradient_serves_every_check_that_compares_with_it(ran: Counter[str]) -> None:
    (context,) = cells("standard", steps=1)
    for check in (gradient, oracle, accumulation, checkpointing):
        assert not ask(check, context, seed=0).breaches
    # The probe, the gradient, and every other way to take it at once.
    assert ran["run_true_fp64 gradients"] == 3


class Doubled(torch.autograd.Function):
    """An identity whose gradient is twice as large."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return 2 * gradients[0]


@pytest.mark.parametrize("fault", ["rows", "training", "recomputation"])
def test_each_way_is_asked_alone_where_all_at_once_change_the_gradient(fault: str) -> None:
    (context,) = cells("quick", steps=1)
    norm = context.model.get_submodule("model.norm")
    block = context.model.get_submodule("model.layers.0")
    inner = norm.forward

    def forward(states: torch.Tensor) -> torch.Tensor:
        wrong = {
            "rows": states.shape[0] == 1,
            "training": norm.training,
            "recomputation": getattr(block, "gradient_checkpointing", False) and norm.training,
        }
        return inner(Doubled.apply(states) if wrong[fault] else states)

    norm.forward = forward  # type: ignore[method-assign]
    assert agreement(context) is None
    modes = ask(checkpointing, context, seed=0).worst
    assert (ask(accumulation, context, seed=0).worst["true-gradient"].value > AGREED) == (fault == "rows")
    assert (modes["true-training-mode"].value > AGREED) == (fault == "training")
    assert (modes["true-gradient"].value > AGREED) == (fault == "recomputation")


def test_a_gradient_is_dropped_after_the_last_check_that_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for user in (_true_gradient, cell_context):
        monkeypatch.setattr(user, "keeps_gradients", lambda _model: False)  # as for a large model
    checks = ("reference.gradient", "train.accumulation", "train.clip")
    settings = Settings(subjects=("fixture:glm4-tiny",), precision=("bf16",), attn=("sdpa",), checks=checks, steps=1)
    session = SuiteSession(settings)
    held = []
    for question in session.plan.questions:
        assert session.answer(question)[0].status == "passed"
        held.append(bool(session.context(question.cell).gradient_passes))
    assert held == [True, False, False]


def test_checks_that_read_the_gradient_of_a_model_that_cannot_be_loaded_are_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: Any, **__: Any) -> Loaded:
        reason = "no such attention"
        raise UnsupportedError(reason)

    monkeypatch.setattr(cell_context, "load", refused)
    checks = ("reference.oracle", "reference.gradient", "train.accumulation")
    session = SuiteSession(
        Settings(subjects=("fixture:glm4-tiny",), precision=("fp32",), attn=("eager",), checks=checks)
    )
    results = [session.answer(question)[0] for question in session.plan.questions]
    assert [(result.status, result.reason) for result in results] == [("skipped", "no such attention")] * 3


def test_the_other_attention_holds_the_same_weights() -> None:
    (context,) = cells()
    ask(attention, context, seed=0)
    loaded, name = context.cached(_other)
    other = loaded.model
    assert name == "eager"
    assert other is not context.model
    for name, parameter in context.model.named_parameters():
        assert other.get_parameter(name).data_ptr() == parameter.data_ptr()


def test_cells_with_equal_numbers_share_their_true_passes(ran: Counter[str]) -> None:
    first, second = cells(precision=("fp32", "bf16"))
    ask(causal, first, seed=0)
    passes = ran["run_true_fp64"]
    assert passes == 4
    assert not ask(causal, second, seed=0).breaches
    assert second.true_passes is first.true_passes
    assert ran["run_true_fp64"] == passes
    assert ran["run_rounded"] == 4  # of its own precision each


ATTENTIONS = ("eager", "sdpa")


def ignoring_padding_of_a_row_alone(context: CellContext) -> None:
    """Let its attention, which is otherwise right, hide no padding from a row that is alone."""
    for block in context.model.get_submodule("model.layers").children():

        def see_all(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask = kwargs["attention_mask"]
            if mask is not None and len(mask) == 1 and mask.shape[-1] == mask.shape[-2]:
                none = torch.zeros_like(mask[0, 0])
                low = torch.ones_like(none).tril() if mask.dtype == torch.bool else none.fill_(float("-inf")).triu(1)
                kwargs["attention_mask"] = low.to(mask.dtype)[None, None]
            return args, kwargs

        block.self_attn.register_forward_pre_hook(see_all, with_kwargs=True)


def test_attentions_share_a_pass_once_one_of_its_kind_has_agreed(ran: Counter[str]) -> None:
    eager, sdpa = cells(attn=ATTENTIONS)
    passes: dict[tuple[str, CellContext], int] = {}
    for context in (eager, sdpa):
        for law in (attention, batch_law, causal, padding, cache):
            before = ran["run_true_fp64"]
            assert not ask(law, context, seed=0).breaches
            passes[law.id, context] = ran["run_true_fp64"] - before
    assert sdpa.true_passes.first is eager.true_passes
    assert (
        passes["forward.attention", sdpa] == 0
    )  # the eager cell ran sdpa over the same batches, for the same comparison
    assert passes["forward.causal", eager] == 2
    assert passes["forward.causal", sdpa] == 0
    for law in (batch_law, padding):
        assert 0 < passes[law.id, sdpa] < passes[law.id, eager]
    assert passes["forward.cache", sdpa] == passes["forward.cache", eager]  # each decodes otherwise than the one before


def test_the_gradient_of_the_other_attention_is_run_once_and_compared(ran: Counter[str]) -> None:
    eager, sdpa = cells("standard", attn=ATTENTIONS, steps=1)
    for check in (gradient, oracle, accumulation, checkpointing):
        assert not ask(check, eager, seed=0).breaches
    before = ran["run_true_fp64 gradients"]
    for check in (gradient, oracle, accumulation, checkpointing):
        assert not ask(check, sdpa, seed=0).breaches
    # The probe, and the gradient that is compared.
    assert ran["run_true_fp64 gradients"] == before + 2


@pytest.mark.parametrize("wrong", ATTENTIONS)
def test_a_mask_that_one_attention_has_wrong_is_found_in_its_cell_alone(wrong: str) -> None:
    contexts = dict(zip(ATTENTIONS, cells(attn=ATTENTIONS), strict=True))
    ignoring_padding_of_a_row_alone(contexts[wrong])
    for attn, context in contexts.items():
        batches = [batch for batch in context.planned_batches if batch.laws_apply]

        def worst(law: CheckSpec, context: CellContext = context, batches: Any = batches) -> float:
            return max(told.value for batch in batches for told in law.function(context, batch) if told.name == "true")

        assert max(map(worst, (attention, causal))) <= AGREED  # whole batches are right under both
        assert (worst(batch_law) > AGREED) == (attn == wrong)


def test_a_law_that_breaks_over_a_pass_of_the_other_attention_is_asked_of_its_own() -> None:
    eager, sdpa = cells(attn=ATTENTIONS)
    for context in (eager, sdpa):
        assert not ask(attention, context, seed=0).breaches
    assert not ask(causal, eager, seed=0).breaches
    for held in eager.true_passes.answers._held.values():
        held.add_(1)
    assert ask(attention, eager, seed=0).breaches  # the eager cell reads what it holds
    outcome = ask(causal, sdpa, seed=0)
    assert not outcome.breaches
    assert outcome.worst["true"].value <= AGREED
    assert sdpa.true_passes.first is None


def test_a_model_that_computes_otherwise_in_its_own_dtype_shares_nothing() -> None:
    first, second = cells(precision=("fp32", "bf16"))

    class Normaliser(nn.Module):
        """Gemma's: a constant in the dtype of the parameters, so that it is another number in each."""

        def __init__(self, inner: nn.Module, dtype: torch.dtype) -> None:
            super().__init__()
            self.inner, self.constant = inner, float(torch.tensor(64**0.5 + 0.01, dtype=dtype))

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.inner(ids) * self.constant
            return found

    for context, dtype in ((first, torch.float32), (second, torch.bfloat16)):
        body = context.model.get_submodule("model")
        weight = body.embed_tokens.weight
        body.embed_tokens.forward = Normaliser(nn.Embedding.from_pretrained(weight.detach()), dtype).forward
    assert first.true_passes is not second.true_passes


def test_a_changed_parameter_shares_nothing() -> None:
    first, second = cells(precision=("fp32", "bf16"))
    with torch.no_grad():
        next(second.model.parameters())[0, 0] += 1
    assert first.true_passes is not second.true_passes


def test_clipping_needs_no_second_run_where_the_first_says_all(monkeypatch: pytest.MonkeyPatch) -> None:
    (context,) = cells(steps=2)
    runs: list[Trainer] = []
    inner = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: runs.append(self) or inner(self))
    outcome = ask(clip, context, seed=0)
    assert len(runs) == 1
    assert outcome.worst["excess"].value < 2**-6
    copy = context.trajectory.clipped_copy
    assert copy is not None
    assert copy.before > 1 >= copy.after * (1 - 2**-6)
    assert outcome.series["clipped-norm"].values == (copy.after,)


def test_clipping_trains_again_where_parameters_are_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """The square of a small gradient is 0 there, and the step is divided by it."""
    (context,) = cells(precision=("pure-fp16",), steps=1, optimizer="sgd")
    runs: list[Trainer] = []
    inner = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self: runs.append(self) or inner(self))
    ask(clip, context, seed=0)
    assert len(runs) == 2


# --- the store -----------------------------------------------------------------------------------------------------


def test_an_answer_is_computed_once_and_the_least_recent_goes_first() -> None:
    store, computed = PassStore(most_bytes=2 * 8 * 100), []

    def read(key: str) -> torch.Tensor:
        return store.read(key, lambda: computed.append(key) or torch.full((100,), 1 / 3, dtype=torch.float64))

    for key in ("a", "b", "a", "c", "a", "b"):
        assert bool((read(key) == 1 / 3).all())
    assert computed == ["a", "b", "c", "b"]
    assert len(store) == 2
    assert store.nbytes <= store.most_bytes


def test_what_many_checks_ask_for_stays_while_others_make_room() -> None:
    store, computed = PassStore(most_bytes=2 * 8 * 100), []

    def read(key: str) -> None:
        store.read(
            key, lambda: computed.append(key) or torch.full((100,), 1 / 3, dtype=torch.float64), lasting=key < "c"
        )

    for key in ("a", "x", "y", "b", "z", "a", "b"):
        read(key)
    assert computed == ["a", "x", "y", "b", "z"]
    assert store.nbytes <= store.most_bytes


@pytest.mark.parametrize(
    ("values", "nbytes"), [([1.0, 0.5], 4), ([1.0, 1 / 3], 16), ([1.0, float("nan")], 16), ([1.0, float("inf")], 4)]
)
def test_an_answer_is_held_narrow_only_where_that_holds_the_same_numbers(values: list[float], nbytes: int) -> None:
    store, answer = PassStore(), torch.tensor(values, dtype=torch.float64)
    for _ in range(2):
        found = store.read("a", lambda: answer, torch.bfloat16)
        assert found.dtype == torch.float64
        assert torch.equal(found.nan_to_num(7), answer.nan_to_num(7))
    assert store.nbytes == nbytes
