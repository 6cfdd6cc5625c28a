"""Encoder-decoders and models of pictures: from files one line that says what to do, from a factory every check that applies."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from families.checkpoints import build
from unit.test_clean_models import assert_clean, statuses

from numerics_suite.core.errors import UnsupportedError
from numerics_suite.subjects.resolve import resolve

TOKENS = {"vocab_size": 300, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
MODELS = {
    "t5": ("T5", {**TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}),
    "bart": (
        "Bart",
        {**TOKENS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 64}
        | {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {
            "text_config": {
                "vocab_size": 300,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 128,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
                "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
            },
            "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
            "image_token_id": 290,
            "video_token_id": 291,
            "vision_start_token_id": 292,
            "vision_end_token_id": 293,
        },
    ),
}


def made(name):
    import transformers

    prefix, config = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(
        getattr(transformers, f"{prefix}Config")(**config)
    )


@pytest.fixture
def factory(monkeypatch):
    """Makes `factory:own_factory:make` a model with a batch of four rows, one of them padded, and six labels each."""

    def of(model, labels=6):
        def make():
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(3, 280, (4, 12), generator=generator)
            mask = torch.ones_like(ids)
            mask[1, 8:] = 0
            return model(), {"input_ids": ids * mask, "attention_mask": mask, "labels": ids[:, :labels].clone()}

        module = ModuleType("own_factory")
        module.make = make
        monkeypatch.setitem(sys.modules, "own_factory", module)
        return "factory:own_factory:make"

    return of


@pytest.mark.parametrize("name", MODELS)
def test_from_files_the_line_says_what_to_do(tmp_path, name):
    made(name).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError) as refused:
        resolve(str(tmp_path))
    assert f"no text-only class of model type {name} for causal-lm; use factory:module:function" in str(refused.value)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_from_a_factory(factory, name):
    found = statuses(factory(lambda: made(name)), precision="fp32")
    assert_clean(found)
    skipped = {check for check, said in found.items() if said == "skipped"}
    assert skipped == {
        *("load.complete", "load.config"),  # no files
        *("forward.cache", "forward.causal", "forward.packing"),  # its encoder sees both sides
        "forward.pooling",  # and pools nothing
        *("reference.oracle", "train.amp"),  # no definition, no autocast in fp32
        "train.trainer",  # asked of decoders and classifiers
    }


def test_an_encoder_that_sees_padding_is_found(factory, monkeypatch):
    import transformers

    own = transformers.T5ForConditionalGeneration.forward

    def maskless(self, attention_mask=None, **keywords):
        return own(self, attention_mask=None, **keywords)

    monkeypatch.setattr(transformers.T5ForConditionalGeneration, "forward", maskless)
    found = statuses(factory(lambda: made("t5")), ("forward.padding",), "fp32")
    assert found["forward.padding"].startswith("failed: padding changes the outputs at real tokens")


def test_a_wrong_loss_of_a_decoder_is_found(factory, monkeypatch):
    import transformers

    own = transformers.T5ForConditionalGeneration.forward

    def halved(self, **keywords):
        output = own(self, **keywords)
        if output.loss is not None:
            output.loss = output.loss / 2
        return output

    assert statuses(factory(lambda: made("t5")), ("train.labels",), "fp32") == {"train.labels": "passed"}
    monkeypatch.setattr(transformers.T5ForConditionalGeneration, "forward", halved)
    assert statuses(factory(lambda: made("t5")), ("train.labels",), "fp32")["train.labels"].startswith("failed")


def test_a_model_of_pictures_decodes_text(factory):
    """It remembers the positions that `generate` counted, and a step without any then counted by them."""
    found = statuses(factory(lambda: made("qwen2_vl"), labels=12), ("forward.cache", "forward.padding"), "fp32")
    assert found == {"forward.cache": "passed", "forward.padding": "passed"}


def test_xlnet_is_padded_on_the_left_and_needs_no_segments(tmp_path):
    found = statuses(build("xlnet", tmp_path), ("forward.padding", "train.grad-flow"), "fp32")
    assert found == {"forward.padding": "passed", "train.grad-flow": "passed"}


class Wrapper(torch.nn.Module):
    """A module of one's own around a model of transformers."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, **keywords):
        return self.inner(**keywords)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("name", ["t5", "qwen2_vl"])
def test_a_wrapped_model_is_held_to_the_references(factory, name, precision):
    source = factory(lambda: Wrapper(made(name)), labels=12)
    found = statuses(source, ("reference.*",), precision, attn=("default",))
    assert found["reference.local"] == found["reference.gradient"] == "passed"
    assert_clean(found)


def test_a_low_precision_section_of_a_wrapped_model_is_found(factory, monkeypatch):
    import transformers

    own = transformers.models.t5.modeling_t5.T5DenseActDense.forward

    def coarse(self, hidden):
        return own(self, hidden).bfloat16().float()

    monkeypatch.setattr(transformers.models.t5.modeling_t5.T5DenseActDense, "forward", coarse)
    found = statuses(factory(lambda: Wrapper(made("t5"))), ("reference.*",), "fp32", attn=("default",))
    assert found["reference.local"].startswith("failed")
