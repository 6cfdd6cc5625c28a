"""GLM-4-9B in the layout of its own remote code (`model_type` `chatglm`).

The same paper as `glm`; here query, key and value are one matrix, and so are gate and up.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from numerics_suite.definitions.config import OracleUnavailable, read_rope, refuse_what_is_not_defined
from numerics_suite.definitions.definition import Head
from numerics_suite.definitions.parts import activation, attend, frequencies, rotate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from typing_extensions import Self

    from numerics_suite.core.records import Task
    from numerics_suite.definitions.definition import Context
    from numerics_suite.definitions.parts import ModuleScope

_REQUIRED = {
    "rmsnorm": True,
    "post_layer_norm": True,
    "multi_query_attention": True,
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "prefix_projection": False,
    "pre_seq_len": None,
}
"""Switches with the value of every GLM-4 checkpoint; other values are variants of ChatGLM2 and 3."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatGlm:
    """The definition of `chatglm`. A key that `config.json` lacks has the value of the layout's own config class.

    Source of each default: the arguments of `ChatGLMConfig` in the remote code published with GLM-4-9B (2024).
    `apply_query_key_layer_scaling`, `attention_softmax_in_fp32` and `fp32_residual_connection` move roundings only.
    """

    family: ClassVar[str] = "chatglm"
    embedding: ClassVar[str] = "transformer.embedding.word_embeddings"
    blocks: ClassVar[str] = "transformer.encoder.layers"
    norm: ClassVar[str] = "transformer.encoder.final_layernorm"

    num_layers: int = 28
    kv_channels: int = 128
    num_attention_heads: int = 32
    multi_query_group_num: int = 1
    layernorm_epsilon: float = 1e-5
    add_qkv_bias: bool = False
    rope_ratio: float = 1.0
    tie_word_embeddings: bool = False  # of every transformers config

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The definition with this `config.json`'s values."""
        refuse_what_is_not_defined(config)
        read_rope(config, theta=10_000.0, fraction=0.5)  # the layout has no such keys; a scaled type is refused
        defaults = {"rmsnorm": True, "post_layer_norm": True}  # the others are False or None in the config class
        for switch, needed in _REQUIRED.items():
            if (config.get(switch, defaults.get(switch)) or None) != (needed or None):
                message = f"the oracle covers `{switch}` of {needed} only"
                raise OracleUnavailable(message)
        return cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.num_layers

    @property
    def eps(self) -> float:
        """The eps of the norms."""
        return self.layernorm_epsilon

    @property
    def untrained_row(self) -> int | None:
        """None: the layout's embedding has no padding row."""
        return None

    def inv_freq(self) -> Tensor:
        """The exact rotary frequencies of the first half of a head; `rope_ratio` stretches the base of 10,000."""
        return frequencies(10_000.0 * self.rope_ratio, self.kv_channels // 2)

    def positions(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Counted from the first real token, as the layout's tokenizer numbers a row that is padded left."""
        if mask is None:
            return torch.arange(input_ids.shape[1])[None]
        return (mask.long().cumsum(-1) - 1).clamp(min=0)

    def block(self, scope: ModuleScope, hidden: Tensor, context: Context) -> Tensor:
        """Norm, attention, residual; norm, gated unit, residual."""
        normed = scope.rms_norm("input_layernorm", hidden, self.eps)
        hidden = hidden + self.attention(scope.below("self_attention"), normed, context)
        normed = scope.rms_norm("post_attention_layernorm", hidden, self.eps)
        return scope.output(hidden + self.gated_unit(scope.below("mlp"), normed))

    def attention(self, scope: ModuleScope, x: Tensor, context: Context) -> Tensor:
        """Grouped causal attention; the rows of one matrix are query heads, key groups, value groups."""
        rows = torch.unflatten(scope.linear("query_key_value", x, bias=self.add_qkv_bias), -1, (-1, self.kv_channels))
        heads, groups = self.num_attention_heads, self.multi_query_group_num
        query, key, value = rows[:, :, :heads], rows[:, :, heads : heads + groups], rows[:, :, heads + groups :]
        mixed = attend(rotate(query, context.turn), rotate(key, context.turn), value, context.visible)
        return scope.output(scope.linear("dense", mixed))

    def gated_unit(self, scope: ModuleScope, x: Tensor) -> Tensor:
        """SwiGLU, the rows of gate above those of up."""
        gate, up = scope.linear("dense_h_to_4h", x).tensor_split(2, dim=-1)
        return scope.output(scope.linear("dense_4h_to_h", activation("silu")(gate) * up))

    def head(self, task: Task) -> Head:
        """`output_layer` without bias, or `classifier_head` with one."""
        if task == "causal-lm":
            weight = f"{self.embedding}.weight" if self.tie_word_embeddings else "transformer.output_layer.weight"
            return Head(path="transformer.output_layer", weight=weight)
        if task == "sequence-classification":
            name = "classifier_head"
            return Head(path=name, weight=f"{name}.weight", bias=f"{name}.bias", sees_pooled_row=True)
        message = f"the family '{self.family}' has no head for the task '{task}'"
        raise OracleUnavailable(message)

    def pooled_column(self, input_ids: Tensor) -> Tensor:
        """The last column, whatever it holds: the layout is padded left."""
        return torch.full((input_ids.shape[0],), input_ids.shape[1] - 1)
