"""GLM-4-9B as transformers lays it out (`model_type` `glm`).

Description: GLM team, "ChatGLM: A Family of Large Language Models from GLM-130B to GLM-4 All Tools" (2024), section 2:
RMSNorm, SwiGLU, rotary embedding on half of each head, grouped queries, no bias except in query, key and value.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from numerics_suite.definitions.config import OracleUnavailable, read_base, refuse_what_is_not_defined
from numerics_suite.definitions.definition import Head
from numerics_suite.definitions.parts import RotaryTable, activation, attend, frequencies, rotate
from numerics_suite.definitions.scalings import Scaling, read_scaling

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from typing_extensions import Self

    from numerics_suite.core.records import Task
    from numerics_suite.definitions.definition import Context
    from numerics_suite.definitions.parts import ModuleScope

_MAX_POSITIONS = 131_072


@dataclass(frozen=True, slots=True, kw_only=True)
class Glm:
    """The definition of `glm`. A key that `config.json` lacks has the value that transformers documents for it.

    Source of each default: the arguments of `GlmConfig` and its docstring, the same from 4.46.0 (where the family
    appears) to 5.24.0, except where said.
    """

    family: ClassVar[str] = "glm"
    embedding: ClassVar[str] = "model.embed_tokens"
    blocks: ClassVar[str] = "model.layers"
    norm: ClassVar[str] = "model.norm"

    hidden_size: int = 4096
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 2  # two groups: the paper, section 2
    head_dim: int | None = 128  # null means hidden size over heads, as 5.x says
    hidden_act: str = "silu"  # SwiGLU: the paper, section 2
    rms_norm_eps: float = 1.5625e-07  # 10 / 2**26, as in the published checkpoint
    attention_bias: bool = True  # of query, key and value; never of the output projection
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 151329  # <|endoftext|> of the published tokenizer
    rope_theta: float = 10_000.0  # from 5.0 `default_theta` of every config
    partial_rotary_factor: float = 0.5  # a key of its own from 4.47; before it, half of each head was fixed
    max_position_embeddings: int = _MAX_POSITIONS
    scaling: Scaling | None = None  # of the rotary embedding

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """The definition with this `config.json`'s values, in the 4.x or the 5.x layout."""
        refuse_what_is_not_defined(config)
        known = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        theta, fraction = read_base(config, theta=10_000.0, fraction=0.5)
        scaling = read_scaling(config, known.get("max_position_embeddings", _MAX_POSITIONS))
        return cls(**known | {"rope_theta": theta, "partial_rotary_factor": fraction, "scaling": scaling})

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
        """The padding row: `torch.nn.Embedding(padding_idx=pad_token_id)` gets no gradient there."""
        return self.pad_token_id

    @property
    def head_width(self) -> int:
        """Width of one head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def inv_freq(self) -> Tensor:
        """The exact rotary frequencies of a short sequence."""
        return self.rotary().inv_freq

    def rotary(self, length: int | None = None) -> RotaryTable:
        """The exact frequencies of a sequence of that length, and what its cosines and sines are multiplied by."""
        width = int(self.head_width * self.partial_rotary_factor)
        if self.scaling is None:
            return RotaryTable.plain(frequencies(self.rope_theta, width))
        return self.scaling.table(self.rope_theta, width, length)

    @property
    def rotary_boundary(self) -> int | None:
        """The longest sequence that has the table of short ones; None where the length changes nothing."""
        return None if self.scaling is None else self.scaling.boundary

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
            torch.unflatten(scope.linear(name, x, bias=self.attention_bias), -1, (-1, self.head_width))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = attend(rotate(query, context.turn), rotate(key, context.turn), value, context.visible)
        return scope.output(scope.linear("o_proj", mixed))

    def gated_unit(self, scope: ModuleScope, x: Tensor) -> Tensor:
        """`W_down (act(W_gate x) · W_up x)`, the rows of gate above those of up in one matrix: Shazeer 2020."""
        gate, up = scope.linear("gate_up_proj", x).tensor_split(2, dim=-1)
        return scope.output(scope.linear("down_proj", activation(self.hidden_act)(gate) * up))

    def head(self, task: Task) -> Head:
        """`lm_head` without bias, or `score`, which has a bias only where it labels tokens."""
        if task == "causal-lm":
            weight = f"{self.embedding}.weight" if self.tie_word_embeddings else "lm_head.weight"
            return Head(path="lm_head", weight=weight)
        if task == "sequence-classification":
            return Head(path="score", weight="score.weight")
        if task == "token-classification":
            return Head(path="score", weight="score.weight", bias="score.bias")
        message = f"the family '{self.family}' has no head for the task '{task}'"
        raise OracleUnavailable(message)

    def pooled_column(self, input_ids: Tensor) -> Tensor:
        """The rightmost token that is not the pad id, column 0 where there is none; without a pad id the last column.

        4.46 took the token before the first pad id, which is the same wherever the pad id is only used as padding.
        """
        if self.pad_token_id is None:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] - 1)
        return (torch.arange(input_ids.shape[1]) * (input_ids != self.pad_token_id)).amax(-1)
