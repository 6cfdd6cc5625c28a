"""`glm4`: GLM-4-0414, with a norm behind attention and feed-forward too."""

from __future__ import annotations

from numerics_suite.subjects.families.family import Family

GLM4 = Family(
    name="glm4",
    model_types=("glm4",),
    first_release="4.51",
    norm_classes=("Glm4RMSNorm",),
    rotary_classes=("Glm4RotaryEmbedding",),
    attention_classes=("Glm4Attention",),
    mlp_classes=("Glm4MLP",),
    block_classes=("Glm4DecoderLayer",),
    packs=True,
    has_oracle=True,
)
