"""A family with its definition: Llama, as transformers lays it out (`model_type` `llama`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from numerics_suite.extending import (
    AddedFamily,
    Context,
    Family,
    Head,
    ModuleScope,
    OracleUnavailable,
    activation,
    attend,
    frequencies,
    read_rope,
    rotate,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """The definition of `llama`: Touvron et al. 2023, section 2.2; the defaults are those of `LlamaConfig`."""

    family: ClassVar[str] = "llama"
    embedding: ClassVar[str] = "model.embed_tokens"
    blocks: ClassVar[str] = "model.layers"
    norm: ClassVar[str] = "model.norm"

    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    rope_theta: float = 10_000.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Llama:
        """The definition with this `config.json`'s values."""
        if config.get("attention_bias") or config.get("mlp_bias") or config.get("quantization_config"):
            message = "this definition of llama covers neither biases nor quantised weights"
            raise OracleUnavailable(message)
        known = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        return cls(**known | {"rope_theta": read_rope(config, theta=10_000.0, fraction=1.0)[0]})

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.num_hidden_layers

    @property
    def eps(self) -> float:
        """The eps of the norms."""
        return self.rms_norm_eps

    @property
    def untrained_row(self) -> int | None:
        """The padding row, which `torch.nn.Embedding(padding_idx=…)` gives no gradient."""
        return self.pad_token_id

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def inv_freq(self) -> Tensor:
        """The exact rotary frequencies, of the whole head."""
        return frequencies(self.rope_theta, self.head_width)

    def positions(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Columns are positions, padded or not; rotary attention only reads their differences."""
        del mask
        return torch.arange(input_ids.shape[1])[None]

    def block(self, scope: ModuleScope, hidden: Tensor, context: Context) -> Tensor:
        """Norm, attention, residual; norm, gated unit, residual."""
        normed = scope.rms_norm("input_layernorm", hidden, self.eps)
        hidden = hidden + self.attention(scope.below("self_attn"), normed, context)
        normed = scope.rms_norm("post_attention_layernorm", hidden, self.eps)
        return scope.output(hidden + self.gated_unit(scope.below("mlp"), normed))

    def attention(self, scope: ModuleScope, x: Tensor, context: Context) -> Tensor:
        """Grouped causal attention over rotated queries and keys."""
        query, key, value = (
            torch.unflatten(scope.linear(name, x), -1, (-1, self.head_width)) for name in ("q_proj", "k_proj", "v_proj")
        )
        query, key = (rotate(_paired(part), context.turn) for part in (query, key))
        return scope.output(scope.linear("o_proj", attend(query, key, value, context.visible)))

    def gated_unit(self, scope: ModuleScope, x: Tensor) -> Tensor:
        """`W_down (act(W_gate x) · W_up x)`: Shazeer 2020."""
        gated = activation(self.hidden_act)(scope.linear("gate_proj", x)) * scope.linear("up_proj", x)
        return scope.output(scope.linear("down_proj", gated))

    def head(self, task: str) -> Head:
        """`lm_head`, or the `score` of a classifier; neither has a bias."""
        if task == "causal-lm":
            weight = f"{self.embedding}.weight" if self.tie_word_embeddings else "lm_head.weight"
            return Head(path="lm_head", weight=weight)
        if task == "sequence-classification":
            return Head(path="score", weight="score.weight")
        message = f"this definition of llama has no head for the task '{task}'"
        raise OracleUnavailable(message)

    def pooled_column(self, input_ids: Tensor) -> Tensor:
        """The rightmost token that is not the pad id; without a pad id the last column."""
        if self.pad_token_id is None:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] - 1)
        return (torch.arange(input_ids.shape[1]) * (input_ids != self.pad_token_id)).amax(-1)


def _paired(x: Tensor) -> Tensor:
    """Llama rotates entry i with entry i + half; put such pairs side by side. Queries and keys alike, so scores stay."""
    return torch.stack(x.chunk(2, dim=-1), dim=-1).flatten(-2)


LLAMA = AddedFamily(
    family=Family(
        name="llama",
        model_types=("llama",),
        norm_classes=("LlamaRMSNorm",),
        rotary_classes=("LlamaRotaryEmbedding",),
        attention_classes=("LlamaAttention", "LlamaSdpaAttention", "LlamaFlashAttention2"),
        mlp_classes=("LlamaMLP",),
        block_classes=("LlamaDecoderLayer",),
        has_oracle=True,
    ),
    oracle=Llama,
)
