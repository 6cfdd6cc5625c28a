"""The check that docs/howto/add-a-check.md makes up does what the page says."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from docs.pages import blocks_of

from numerics_suite.core.records import Batch, Budget
from numerics_suite.judgement.verdicts import within
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.session import SuiteSession

PAGE = "docs/howto/add-a-check.md"


@pytest.fixture(scope="module")
def example():
    """The page's check and its budget, as the package would import them."""
    question, row = (block for block in blocks_of(PAGE) if block.language == "python")
    name = question.title.removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    sys.modules[name] = module
    try:
        exec(compile(question.text, question.place, "exec"), module.__dict__)
        exec(compile(row.text, row.place, "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[name]


@pytest.fixture
def context():
    """One cell of a shipped checkpoint, as the suite would hand it to a check."""
    session = SuiteSession(
        Settings(
            subjects=("fixture:glm4-tiny",),
            precision=("bf16",),
            attn=("sdpa",),
            device="cpu",
            origins={"precision": "command line"},
        )
    )
    (cell,) = session.plan.cells
    return session.context(cell)


BATCH = Batch(
    tensors={"input_ids": torch.arange(24).view(2, 12) * 7, "attention_mask": torch.ones(2, 12, dtype=torch.long)}
)


def test_its_id_and_question_are_those_of_the_page(example):
    assert example.strides.id == "inputs.strides"
    assert example.strides.doc == "Does a batch that is a view of a larger one give the same bits as its copy?"
    assert isinstance(example.STRIDES, Budget)
    assert example.STRIDES.check == example.strides.id


def test_a_sound_model_passes(example, context):
    (found,) = example.strides.function(context, BATCH)
    assert found.name == example.STRIDES.measurement
    assert within(found.value, example.STRIDES.limit)


def test_a_model_that_reads_past_strides_is_found(example, context):
    embedding = context.model.get_input_embeddings()
    plain = embedding.forward
    embedding.forward = lambda ids: plain(torch.as_strided(ids, ids.shape, (ids.shape[1], 1)))
    (found,) = example.strides.function(context, BATCH)
    assert found.value > 0
    assert not within(found.value, example.STRIDES.limit)
