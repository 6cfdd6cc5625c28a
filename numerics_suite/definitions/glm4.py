"""GLM-4-0414 as transformers lays it out (`model_type` `glm4`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from numerics_suite.definitions.glm import Glm

if TYPE_CHECKING:
    from torch import Tensor

    from numerics_suite.definitions.definition import Context
    from numerics_suite.definitions.parts import ModuleScope


@dataclass(frozen=True, slots=True, kw_only=True)
class Glm4(Glm):
    """The definition of `glm4`: GLM with a second norm behind attention and gated unit (a "sandwich").

    Source of the defaults: the arguments of `Glm4Config`, from 4.51.0 (where the family appears) to 5.24.0; they are
    those of `GlmConfig`, `partial_rotary_factor` included. Layout: the published GLM-4-9B-0414 checkpoint's names.
    """

    family: ClassVar[str] = "glm4"

    def block(self, scope: ModuleScope, hidden: Tensor, context: Context) -> Tensor:
        """Norm, attention, norm, residual; norm, gated unit, norm, residual."""
        normed = scope.rms_norm("input_layernorm", hidden, self.eps)
        attended = self.attention(scope.below("self_attn"), normed, context)
        hidden = hidden + scope.rms_norm("post_self_attn_layernorm", attended, self.eps)
        normed = scope.rms_norm("post_attention_layernorm", hidden, self.eps)
        gated = self.gated_unit(scope.below("mlp"), normed)
        return scope.output(hidden + scope.rms_norm("post_mlp_layernorm", gated, self.eps))
