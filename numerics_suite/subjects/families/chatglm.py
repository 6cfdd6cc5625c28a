"""`chatglm`: the remote-code layout of GLM-4-9B."""

from __future__ import annotations

from numerics_suite.subjects.families.family import Family

CHATGLM = Family(
    name="chatglm",
    model_types=("chatglm",),
    head_names=("classifier_head",),
    lm_head_names=("output_layer",),
    backbone_names=("transformer",),
    # Its classifier reads the last column, so only the left side leaves a real token there.
    pooling="last-column",
    padding_sides=("left",),
    norm_classes=("RMSNorm", "LayerNorm"),
    rotary_classes=("RotaryEmbedding",),
    attention_classes=("SelfAttention",),
    mlp_classes=("MLP",),
    block_classes=("GLMBlock",),
    embedding_suffixes=("word_embeddings.weight",),
    has_oracle=True,
)
