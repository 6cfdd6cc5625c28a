"""Batches at the longest row that a model takes: laws add columns to them, and some positions begin later than at 0."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from families.checkpoints import build
from unit.test_clean_models import assert_clean, statuses

TWELVE = {
    "llama-dynamic": {},
    "gpt2": {"n_positions": 12},
    "bert": {"max_position_embeddings": 12},
    "roberta": {"max_position_embeddings": 12},
    "biogpt": {"max_position_embeddings": 12},
}
"""Models of at most twelve tokens; RoBERTa's of eleven, since its positions begin behind the row of padding."""


@pytest.mark.parametrize("name", TWELVE)
def test_a_model_is_asked_within_its_longest_row(tmp_path, name):
    found = statuses(
        build(name, tmp_path, **TWELVE[name]), ("forward.padding", "forward.cache", "train.finite"), seq_len=64
    )
    assert found["forward.padding"] == found["train.finite"] == "passed"
    assert_clean(found)


def test_a_long_batch_of_ones_own_is_no_finding_under_dynamic_rope(tmp_path, monkeypatch):
    """Twenty tokens turn every token by another table than twelve do, and the model remembers them."""
    import transformers

    folder = build("llama-dynamic", tmp_path)

    def make():
        ids = torch.arange(3, 43).reshape(2, 20)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return model, {"input_ids": ids * mask, "attention_mask": mask, "labels": ids}

    module = ModuleType("long_batch")
    module.make = make
    monkeypatch.setitem(sys.modules, "long_batch", module)
    checks = ("forward.batch", "forward.causal", "forward.cache", "forward.padding")
    found = statuses("factory:long_batch:make", checks, "fp32")
    assert found["forward.batch"] == "passed"
    assert_clean(found)
