"""`glm4_moe`: the mixture-of-experts models from GLM-4.5 on."""

from __future__ import annotations

from numerics_suite.subjects.families.family import Family

GLM4_MOE = Family(
    name="glm4_moe",
    model_types=("glm4_moe",),
    first_release="4.54",
    norm_classes=("Glm4MoeRMSNorm",),
    rotary_classes=("Glm4MoeRotaryEmbedding",),
    attention_classes=("Glm4MoeAttention",),
    mlp_classes=("Glm4MoeMLP", "Glm4MoeMoE"),
    block_classes=("Glm4MoeDecoderLayer",),
    packs=True,
)
