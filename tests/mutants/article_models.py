"""Models with the article's defects, for `factory:mutants.article_models:…`; each is `sound` with one change.

Nothing here imports the suite, so a reproducer can call it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mutants.editing import edited, overridden

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def _model(name: str = "glm-tiny") -> Any:
    """A shipped checkpoint's model in float32, as a user's own code would make it."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if name.endswith("classifier") else AutoModelForCausalLM
    model = auto.from_pretrained(FIXTURES / name, attn_implementation="eager")
    return model.float()


def _batch(length: int = 24) -> dict[str, Tensor]:
    """Ids all over the vocabulary, odd ones too, with labels."""
    ids = (torch.arange(2 * length).view(2, length) * 29 + 257) % 739
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def sound() -> tuple[nn.Module, dict[str, Tensor]]:
    """Nothing is wrong."""
    return _model(), _batch()


def sound_model() -> nn.Module:
    """Nothing is wrong; no batch comes with it."""
    return _model()


def sound_classifier() -> nn.Module:
    """Nothing is wrong."""
    return _model("glm-tiny-classifier")


def ids_through_bf16() -> tuple[nn.Module, dict[str, Tensor]]:
    """The batch was cast to bfloat16 as a whole, and its ids back to integers."""
    batch = _batch()
    batch["input_ids"] = batch["input_ids"].to(torch.bfloat16).long()
    return _model(), batch


def ids_as_floats() -> tuple[nn.Module, dict[str, Tensor]]:
    """The batch was cast to bfloat16 as a whole."""
    return _model(), _batch() | {"input_ids": _batch()["input_ids"].to(torch.bfloat16)}


def mask_as_floats() -> tuple[nn.Module, dict[str, Tensor]]:
    """A collator that makes every tensor float."""
    return _model(), _batch() | {"attention_mask": _batch()["attention_mask"].float()}


def ids_out_of_range() -> tuple[nn.Module, dict[str, Tensor]]:
    """A token was added to the tokenizer and not to the model."""
    batch = _batch()
    batch["input_ids"][0, 3] = 768
    return _model(), batch


def norm_without_fp32() -> nn.Module:
    """States of some hundreds, whose squares float16 cannot hold, and no float32 section in the norm."""
    model = _model()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1000)
    edited("model.layers.0.input_layernorm", "forward", "hidden_states.to(torch.float32)", "hidden_states")(model)
    return model


def products_beyond_fp16() -> nn.Module:
    """One product in the feed-forward part leaves float16's range."""
    model = _model()
    with torch.no_grad():
        model.model.layers[1].mlp.gate_up_proj.weight.mul_(300)
    return model


def fully_masked_row() -> nn.Module:
    """A padded query sees no key: softmax over minus infinity."""
    model = _model()
    edited(
        "model.layers.1.self_attn",
        "eager_attention_forward",
        "softmax(attn_weights, dim=-1",
        "softmax(attn_weights.masked_fill(attn_weights < -1e30, float('-inf')), dim=-1",
    )(model)
    return model


def zero_by_zero_at_padding() -> nn.Module:
    """States are divided by their length, which is 0 for the pad id's row of zeros."""
    model = _model()
    with torch.no_grad():
        model.model.embed_tokens.weight[model.config.pad_token_id] = 0
    overridden(
        "model.embed_tokens", forward=lambda own, self, ids: own(self, ids) / own(self, ids).norm(dim=-1, keepdim=True)
    )(model)
    return model


def reciprocal_at_padding() -> nn.Module:
    """A norm without eps: the reciprocal root of 0 is infinite."""
    model = _model()
    with torch.no_grad():
        model.model.embed_tokens.weight[model.config.pad_token_id] = 0
    model.model.layers[0].input_layernorm.variance_epsilon = 0.0
    return model


def untied() -> nn.Module:
    """The config ties both embeddings and the model holds two tensors."""
    model = _model()
    model.config.tie_word_embeddings = True
    return model


def detached_branch() -> nn.Module:
    """The feed-forward part of one block passes no gradient."""
    model = _model()
    overridden("model.layers.1.mlp", forward=lambda own, self, x: own(self, x).detach())(model)
    return model


def gradient_never_finite() -> nn.Module:
    """The forward pass is right and every backward pass is NaN, so a loss scaler skips every step."""
    model = _model()

    def root_of_zero(own: Any, self: Any, x: Any) -> Any:
        output = own(self, x)
        return output + 0.0 * torch.sqrt((output - output).clamp(min=0))

    overridden("model.layers.1.mlp", forward=root_of_zero)(model)
    return model


def gradient_beyond_any_scale() -> nn.Module:
    """Gradients so large that float16 overflows at every loss scale that the scaler falls to."""
    model = _model()

    def steep(own: Any, self: Any, x: Any) -> Any:
        output = own(self, x)
        return output + 1e9 * (output - output.detach())

    overridden("model.layers.1.mlp", forward=steep)(model)
    return model


def pooled_padding() -> nn.Module:
    """The classifier reads the last column whatever the padding."""
    model = _model("glm-tiny-classifier")
    edited("", "forward", ".argmax(-1)", ".argmax(-1) * 0 - 1")(model)
    return model
