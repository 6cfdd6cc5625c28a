"""`generic`: any other model that an Auto class can load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numerics_suite.subjects.families.family import Family

ABSOLUTE_POSITIONS = frozenset({"gpt2", "gpt_neo", "gpt_bigcode", "openai-gpt", "ctrl", "biogpt"})
"""Decoders with learned or fixed absolute positions counted from the first column: a pad on the left moves every token."""

ENCODERS = frozenset(
    {"distilbert", "esmc", "eurobert", "flaubert", "funnel", "modernbert", "mpnet", "neomme", "perceiver", "tapas"}
    | {"ultrabert", "xlm", "xlnet"}
)
"""Encoders without any config key that identifies one; all others in transformers' table of masked models have such a
key."""

GENERIC = Family(
    name="generic",
    model_types=(),
    head_names=("score", "classifier", "classifier_head", "classification_head"),
    lm_head_names=("lm_head", "output_layer", "embed_out"),
    backbone_names=("model", "transformer", "gpt_neox"),
    norm_classes=("RMSNorm", "LayerNorm"),
    rotary_classes=("RotaryEmbedding",),
    attention_classes=("Attention", "SdpaAttention", "FlashAttention2"),
    mlp_classes=("MLP",),
    block_classes=("DecoderLayer", "Block"),
    embedding_suffixes=("embed_tokens.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight"),
)

ENCODER = replace(GENERIC, pooling="unknown", padding_sides=("right",), causal=False)
"""An encoder sees both sides, pools its first token or a mean, and its absolute positions allow padding on the right
only."""


LEFT_PADDED = frozenset({"xlnet"})
"""Encoders that are padded on the left, since they pool the last token; their positions are relative."""


def generic_family(config: Mapping[str, Any]) -> Family:
    """The generic family as it fits this config: padding sides and pooling differ between decoders and encoders.

    Args:
        config: raw `config.json`; empty for a plain module.
    """
    names = tuple(str(name) for name in config.get("architectures") or ())
    encodes = config.get("is_encoder_decoder") or any(name.endswith("ForMaskedLM") for name in names)
    # An encoder's classifier has no class name of its own; these two keys are specific to encoders.
    absolute = "type_vocab_size" in config or config.get("position_embedding_type") == "absolute"
    encodes = encodes or absolute or config.get("model_type") in ENCODERS
    if encodes and not config.get("is_decoder"):
        return replace(ENCODER, padding_sides=("left",)) if config.get("model_type") in LEFT_PADDED else ENCODER
    if config.get("model_type") in ABSOLUTE_POSITIONS:
        return replace(GENERIC, padding_sides=("right",))
    if config.get("use_bidirectional_attention") is True or config.get("is_causal") is False:
        return replace(GENERIC, causal=False)
    return GENERIC
