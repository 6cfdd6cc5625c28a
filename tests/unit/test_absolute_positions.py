"""Decoders with a vector for each position: padding on the left moves every token, unless `position_ids` are given."""

from __future__ import annotations

import pytest
from unit.test_clean_models import BODY, SMALL, save, statuses

CHECK = ("forward.padding",)
DECODER = {**BODY, "intermediate_size": 64, "is_decoder": True}
MODELS = {
    "bert": ("BertLMHeadModel", "BertConfig", DECODER),
    "megatron-bert": ("MegatronBertForCausalLM", "MegatronBertConfig", DECODER),
    "rembert": (
        "RemBertForCausalLM",
        "RemBertConfig",
        {**DECODER, "input_embedding_size": 16, "output_embedding_size": 48},
    ),
    "big_bird": ("BigBirdForCausalLM", "BigBirdConfig", {**DECODER, "attention_type": "original_full"}),
    "xglm": (
        "XGLMForCausalLM",
        "XGLMConfig",
        {**SMALL, "d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 64, "max_position_embeddings": 64},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_columns_that_are_counted_are_no_finding(tmp_path, name):
    model, config, keywords = MODELS[name]
    folder = save(tmp_path, model, config, **keywords)
    assert statuses(folder, CHECK, "fp32", max_examples=6) == {"forward.padding": "passed"}


def test_an_ignored_mask_is_seen_all_the_same(tmp_path, monkeypatch):
    import transformers

    own = transformers.MegatronBertModel.forward

    def maskless(self, input_ids=None, attention_mask=None, *args, **kwargs):
        return own(self, input_ids, None, *args, **kwargs)

    monkeypatch.setattr(transformers.MegatronBertModel, "forward", maskless)
    model, config, keywords = MODELS["megatron-bert"]
    found = statuses(save(tmp_path, model, config, **keywords), CHECK, "fp32", max_examples=6)
    assert found["forward.padding"].startswith("failed: padding changes the outputs at real tokens")
