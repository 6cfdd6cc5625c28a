"""Mistakes in how blocks are put together: residuals, norms around the parts, the order of blocks, the embedding."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from mutants.catalogue.record import ORACLE, Mutant
from mutants.editing import edited, overridden

GLM, CHATGLM, CHATGLM_STACK = "model.layers.1", "transformer.encoder.layers.1", "transformer.encoder"
GLM_NAME, CHATGLM_NAME = GLM.replace(".", r"\."), CHATGLM.replace(".", r"\.")
INPUT_NORM = "hidden_states = self.input_layernorm(hidden_states)"
MIDDLE_NORM = "hidden_states = self.post_attention_layernorm(hidden_states)"
ADD = "hidden_states = residual + hidden_states"


def _scaled(own: Any, self: Any, ids: Any) -> Any:
    return own(self, ids) * math.sqrt(self.weight.shape[1])


def _noisy(own: Any, self: Any, x: Any) -> Any:
    return nn.functional.dropout(own(self, x), p=0.05, training=True)


MUTANTS = (
    Mutant(
        id="residual-from-behind-the-norm",
        family="glm",
        apply=edited(GLM, "forward", INPUT_NORM, "hidden_states = residual = self.input_layernorm(hidden_states)"),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="the residual is taken behind the norm",
    ),
    Mutant(
        id="residual-from-behind-the-norm-chatglm",
        family="chatglm",
        apply=edited(CHATGLM, "_add", "if self.config.apply_residual_connection_post_layernorm:", "if True:"),
        expected_checks=(ORACLE,),
        module_pattern=CHATGLM_NAME,
        why="apply_residual_connection_post_layernorm taken for true",
    ),
    Mutant(
        id="residual-of-attention-missing",
        family="glm4",
        apply=edited(GLM, "forward", ADD, "pass", which=0),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="attention's output replaces the state instead of being added",
    ),
    Mutant(
        id="residual-of-mlp-missing",
        family="glm",
        apply=edited(GLM, "forward", ADD, "pass", which=1),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="the feed-forward part's output replaces the state",
    ),
    Mutant(
        id="residual-halved",
        family="glm4",
        apply=edited(GLM, "forward", ADD, "hidden_states = residual + 0.5 * hidden_states", which=1),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="a residual multiplier, as Granite has, of one half",
    ),
    Mutant(
        id="residual-of-the-block-s-input",
        family="glm",
        apply=edited(GLM, "forward", MIDDLE_NORM, "hidden_states = self.post_attention_layernorm(residual)"),
        expected_checks=(),
        why="the second norm reads a variable of the same value: nothing changes",
        equivalent=True,
    ),
    Mutant(
        id="residual-in-bf16",
        kind="worse",
        family="glm",
        apply=edited(
            GLM,
            "forward",
            ADD,
            "hidden_states = (residual.bfloat16() + hidden_states.bfloat16()).to(residual.dtype)",
            which=1,
        ),
        expected_checks=("reference.local",),
        module_pattern=GLM_NAME,
        why="the residual is added in bfloat16 in an fp32 model",
    ),
    Mutant(
        id="parallel-attention-and-mlp",
        family="chatglm",
        apply=edited(
            CHATGLM,
            "forward",
            "normed = self.post_attention_layernorm(hidden_states).to(compute_dtype)",
            "normed = self.post_attention_layernorm(normed).to(compute_dtype)",
        ),
        expected_checks=(ORACLE,),
        module_pattern=CHATGLM_NAME,
        why="the feed-forward part reads the block's input, as in parallel blocks",
    ),
    Mutant(
        id="post-norm-of-attention-missing",
        family="glm4",
        apply=edited(GLM, "forward", "hidden_states = self.post_self_attn_layernorm(hidden_states)", "pass"),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=GLM_NAME + r"(\.post_self_attn_layernorm)?",
        why="Glm4's norm behind attention is left out, as Glm has it",
    ),
    Mutant(
        id="post-norm-of-mlp-missing",
        family="glm4",
        apply=edited(GLM, "forward", "hidden_states = self.post_mlp_layernorm(hidden_states)", "pass"),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=GLM_NAME + r"(\.post_mlp_layernorm)?",
        why="Glm4's norm behind the feed-forward part is left out",
    ),
    Mutant(
        id="post-norms-mixed-up",
        family="glm4",
        apply=edited(
            GLM,
            "forward",
            "hidden_states = self.post_self_attn_layernorm(hidden_states)",
            "hidden_states = self.post_mlp_layernorm(hidden_states)",
        ),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=GLM_NAME + r"(\.post_self_attn_layernorm|\.post_mlp_layernorm)?",
        why="both parts go through the same norm",
    ),
    Mutant(
        id="post-norm-before-attention",
        family="glm4",
        apply=edited(GLM, "forward", INPUT_NORM, "hidden_states = self.post_attention_layernorm(hidden_states)"),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=GLM_NAME + r"(\.input_layernorm|\.post_attention_layernorm)?",
        why="the wrong norm stands before attention",
    ),
    Mutant(
        id="last-norm-missing",
        family="chatglm",
        apply=edited(
            CHATGLM_STACK, "forward", "self.final_layernorm(hidden_states).to(dtype)", "hidden_states.to(dtype)"
        ),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=r"transformer\.encoder(\.final_layernorm)?",
        why="the last norm is left out",
    ),
    Mutant(
        id="last-norm-twice",
        family="chatglm",
        apply=edited(
            CHATGLM_STACK,
            "forward",
            "self.final_layernorm(hidden_states).to(dtype)",
            "self.final_layernorm(self.final_layernorm(hidden_states)).to(dtype)",
        ),
        expected_checks=(ORACLE,),
        module_pattern=r"transformer\.encoder(\.final_layernorm)?",
        why="the last norm is applied twice",
    ),
    Mutant(
        id="blocks-in-other-order",
        family="chatglm",
        apply=edited(
            CHATGLM_STACK,
            "forward",
            "for layer in self.layers:",
            "for layer in (self.layers[0], *self.layers[2:], self.layers[1]):",
        ),
        expected_checks=(ORACLE,),
        module_pattern=r"transformer\.encoder(\.layers\.[12](\..*)?)?",
        why="blocks 1 and 2 run in the other order",
    ),
    Mutant(
        id="block-skipped",
        family="chatglm",
        apply=edited(CHATGLM_STACK, "forward", "for layer in self.layers:", "for layer in self.layers[:-1]:"),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=r"transformer\.encoder(\.layers\.2(\..*)?|\.final_layernorm)?",
        why="the last block is not run",
    ),
    Mutant(
        id="hidden-dropout-left-on",
        family="glm",
        apply=overridden(GLM + ".mlp", forward=_noisy),
        expected_checks=("forward.deterministic",),
        module_pattern=GLM_NAME + r"\.mlp",
        why="dropout on the feed-forward part in eval mode",
    ),
    Mutant(
        id="embedding-scaled",
        family="glm",
        apply=overridden("model.embed_tokens", forward=_scaled),
        expected_checks=(ORACLE,),
        module_pattern=r"model\.embed_tokens",
        why="Gemma's embedding scale, the root of the hidden size",
    ),
    Mutant(
        id="embedding-in-fp16",
        kind="worse",
        family="glm4",
        apply=overridden(
            "model.embed_tokens", forward=lambda own, self, ids: (own(self, ids) / 3).half().to(self.weight.dtype) * 3
        ),
        expected_checks=("reference.local",),
        module_pattern=r"model\.embed_tokens",
        why="embedded states pass through float16 in an fp32 model",
    ),
    Mutant(
        id="embedding-ids-through-bf16",
        kind="worse",
        family="glm",
        apply=overridden(
            "model.embed_tokens", forward=lambda own, self, ids: own(self, ids.bfloat16().long().clamp(max=767))
        ),
        expected_checks=("inputs.ids-dtype",),
        module_pattern=r"model\.embed_tokens",
        why="ids are cast with the rest of the batch and back: those above 256 change",
    ),
    Mutant(
        id="embedding-takes-floats",
        kind="contract",
        family="glm4",
        apply=overridden("model.embed_tokens", forward=lambda own, self, ids: own(self, ids.long())),
        expected_checks=("inputs.ids-dtype",),
        module_pattern=r"model\.embed_tokens",
        why="floating ids are silently turned into integers",
    ),
    Mutant(
        id="embedding-last-row-lost",
        family="glm",
        apply=overridden("model.embed_tokens", forward=lambda own, self, ids: own(self, ids.clamp(max=766))),
        expected_checks=("inputs.ids-dtype", ORACLE),
        module_pattern=r"model\.embed_tokens",
        why="the last id of the vocabulary is clamped to the one before, by an off-by-one in a range check",
    ),
    Mutant(
        id="embedding-permuted-by-batch",
        family="glm4",
        apply=overridden(
            "model.embed_tokens",
            forward=lambda own, self, ids: (
                own(self, ids) + 1e-3 * torch.arange(ids.shape[0]).to(self.weight.dtype)[:, None, None]
            ),
        ),
        expected_checks=("forward.batch", ORACLE),
        module_pattern=r"model\.embed_tokens",
        why="a row's place in the batch enters its states",
    ),
)
