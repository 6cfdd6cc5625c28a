"""What a check says never depends on what was asked before it, whatever the model's own code leaves behind."""

from __future__ import annotations

import random

import pytest
import torch
from families.checkpoints import build

from numerics_suite.settings.tree import Settings
from numerics_suite.suite.session import SuiteSession

LEAKS = {
    "attribute": (lambda model: setattr(model, "seen", 1), lambda model: getattr(model, "seen", 0)),
    "buffer": (lambda model: model.count.add_(1), lambda model: model.count),
    "dict": (lambda model: model.notes.update(seen=1), lambda model: len(model.notes)),
    "list": (lambda model: model.lists["seen"].append(1), lambda model: len(model.lists["seen"])),
    "config": (lambda model: setattr(model.config, "seen", 1), lambda model: getattr(model.config, "seen", 0)),
}
"""How a model notes that it saw something, and how it reads that later."""


def session_of(folder: str, precision: str, checks: tuple[str, ...] = (), max_examples: int = 3) -> SuiteSession:
    settings = Settings(
        subjects=(folder,),
        precision=(precision,),
        attn=("eager",),
        checks=checks,
        device="cpu",
        max_examples=max_examples,
        seq_len=12,
        diagnose=False,
        origins={"precision": "command line"},
    )
    return SuiteSession(settings)


def answers(folder: str, precision: str, checks: tuple[str, ...] = (), order: int | None = None) -> dict[str, object]:
    """Status, reason and every number of each check.

    Args:
        folder: a checkpoint.
        precision: of the cell.
        checks: which; all without any.
        order: seed of the order in which one session asks them; None asks each in a session of its own, so that nothing
            came before.
    """
    questions = list(session_of(folder, precision, checks).plan.questions)
    shared = session_of(folder, precision, checks)
    if order is not None:
        random.Random(order).shuffle(questions)
    told = {}
    for question in questions:
        session = shared if order is not None else session_of(folder, precision, (question.check,))
        result = session.answer(question)[0]
        told[question.check] = (result.status, result.reason, dict(result.measurements))
    return told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "llama-dynamic"])
def test_every_order_gives_the_numbers_of_each_check_alone(tmp_path, name):
    folder = build(name, tmp_path)
    alone = answers(folder, "bf16")
    assert {status for status, *_ in alone.values()} == {"passed", "skipped"}
    for order in (1, 2):
        assert answers(folder, "bf16", order=order) == alone


@pytest.mark.parametrize("leak", LEAKS)
def test_what_a_forward_pass_leaves_behind_does_not_reach_the_next_check(tmp_path, monkeypatch, leak):
    """Only forward.finite draws pad ids among the real tokens; having seen one the model mixes its rows."""
    import transformers

    own_init, own = transformers.LlamaModel.__init__, transformers.LlamaModel.forward
    leave, read = LEAKS[leak]
    left = []

    def init(self, config):
        own_init(self, config)
        self.register_buffer("count", torch.zeros(()), persistent=False)
        self.notes, self.lists = {}, {"seen": []}

    def forward(self, input_ids=None, attention_mask=None, **keywords):
        output = own(self, input_ids=input_ids, attention_mask=attention_mask, **keywords)
        mixed = output.last_hidden_state + output.last_hidden_state.mean(0, keepdim=True)
        output.last_hidden_state = mixed if read(self) else output.last_hidden_state
        if attention_mask is not None and bool(((input_ids == 0) & (attention_mask != 0)).any()):
            left.append(leak)
            leave(self)
        return output

    monkeypatch.setattr(transformers.LlamaModel, "__init__", init)
    monkeypatch.setattr(transformers.LlamaModel, "forward", forward)
    session = session_of(build("llama", tmp_path), "fp32", ("forward.finite", "forward.batch"), max_examples=30)
    by_check = {question.check: question for question in session.plan.questions}
    model = session.context(by_check["forward.finite"].cell).model.model
    model.count.zero_()  # a load does not fill a buffer that is not stored
    told = [session.answer(by_check[check])[0].status for check in ("forward.finite", "forward.batch")]
    assert told == ["passed", "passed"]
    assert left
    assert not read(model)


def test_random_numbers_begin_anew_with_each_check(tmp_path, monkeypatch):
    import transformers

    own = transformers.LlamaModel.forward

    def noisy(self, *args, **keywords):
        output = own(self, *args, **keywords)
        noise = torch.randn_like(output.last_hidden_state)
        output.last_hidden_state = output.last_hidden_state + 0.1 * noise
        return output

    folder = build("llama", tmp_path)
    monkeypatch.setattr(transformers.LlamaModel, "forward", noisy)
    checks = ("forward.deterministic", "forward.batch", "forward.headroom", "train.descends")
    alone = answers(folder, "fp32", checks)
    assert alone["forward.deterministic"][0] == "failed"
    assert answers(folder, "fp32", checks, order=1) == alone
