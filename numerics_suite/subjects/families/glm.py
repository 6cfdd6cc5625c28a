"""`glm`: GLM-4-9B as implemented in transformers."""

from __future__ import annotations

from numerics_suite.subjects.families.family import Family

GLM = Family(
    name="glm",
    model_types=("glm",),
    first_release="4.46",
    norm_classes=("GlmRMSNorm",),
    rotary_classes=("GlmRotaryEmbedding",),
    # The last two are the classes per implementation of releases before 4.48.
    attention_classes=("GlmAttention", "GlmSdpaAttention", "GlmFlashAttention2"),
    mlp_classes=("GlmMLP",),
    block_classes=("GlmDecoderLayer",),
    packs=True,
    has_oracle=True,
)
