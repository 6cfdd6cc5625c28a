"""Mistakes in attention: its scale, its heads, its mask, its softmax."""

from __future__ import annotations

from mutants.catalogue.record import ORACLE, Mutant
from mutants.editing import edited, on

GLM, CHATGLM, CHATGLM_BODY = "model.layers.1.self_attn", "transformer.encoder.layers.1.self_attention", "transformer"
GLM_NAME, CHATGLM_NAME = GLM.replace(".", r"\."), CHATGLM.replace(".", r"\.")
EAGER = "eager_attention_forward"
SCORES = "attn_weights = torch.matmul(query, key_states.transpose(2, 3)) * scaling"
WITH_MASK = "attn_weights = attn_weights + attention_mask"
CAUSAL = "causal & (real[:, None, None, :] | (keys == queries)[None, None])"
FIRST_ATTENTION = r"transformer\.encoder\.layers\.0(\.self_attention)?"

MUTANTS = (
    Mutant(
        id="attention-scale-missing",
        family="glm",
        attn="sdpa",
        apply=on(GLM, lambda attention: setattr(attention, "scaling", 1.0)),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="scores are not divided by the root of the head's size, in every implementation",
    ),
    Mutant(
        id="attention-scale-twice",
        family="glm4",
        apply=edited(GLM, EAGER, SCORES, SCORES + " * scaling"),
        expected_checks=("forward.attention", ORACLE),
        module_pattern=GLM_NAME,
        why="the scale is applied twice in eager attention",
    ),
    Mutant(
        id="attention-scale-of-rotary-part",
        family="glm4",
        apply=on(GLM, lambda attention: setattr(attention, "scaling", 8**-0.5)),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME,
        why="scaled by the rotary dimension instead of the head's",
    ),
    Mutant(
        id="attention-scale-missing-chatglm",
        family="chatglm",
        apply=edited(CHATGLM, "_eager", " * self.head_dim**-0.5", ""),
        expected_checks=("forward.attention", ORACLE),
        module_pattern=CHATGLM_NAME,
        why="scores are not scaled in eager attention",
    ),
    Mutant(
        id="attention-groups-in-other-order",
        family="glm",
        apply=edited(
            GLM,
            "repeat_kv",
            "hidden_states[:, :, None, :, :].expand(batch, num_key_value_heads, n_rep, slen, head_dim)",
            "hidden_states[:, None, :, :, :].expand(batch, n_rep, num_key_value_heads, slen, head_dim)",
        ),
        expected_checks=("forward.attention", ORACLE),
        module_pattern=GLM_NAME,
        why="key and value heads are tiled (0 1 0 1) instead of repeated (0 0 1 1)",
    ),
    Mutant(
        id="attention-groups-in-other-order-chatglm",
        family="chatglm",
        attn="sdpa",
        apply=edited(CHATGLM, "forward", "key.repeat_interleave(repeats, dim=1)", "key.repeat(1, repeats, 1, 1)"),
        expected_checks=(ORACLE,),
        module_pattern=CHATGLM_NAME,
        why="key heads are tiled, value heads are repeated, in every implementation",
    ),
    Mutant(
        id="attention-key-and-value-swapped",
        family="chatglm",
        apply=edited(CHATGLM, "forward", "query, key, value = (", "query, value, key = ("),
        expected_checks=(ORACLE,),
        module_pattern=CHATGLM_NAME,
        why="the rows of query_key_value are read as heads | values | keys",
    ),
    Mutant(
        id="attention-heads-not-brought-back",
        family="glm4",
        apply=edited(GLM, EAGER, "attn_output.transpose(1, 2).contiguous()", "attn_output.contiguous()"),
        expected_checks=("forward.causal", "forward.attention", ORACLE),
        module_pattern=GLM_NAME,
        why="heads and positions are not transposed back, so positions mix",
    ),
    Mutant(
        id="attention-softmax-over-queries",
        family="glm",
        apply=edited(GLM, EAGER, "softmax(attn_weights, dim=-1", "softmax(attn_weights, dim=-2"),
        expected_checks=("forward.causal", "forward.attention", ORACLE),
        module_pattern=GLM_NAME,
        why="softmax over the queries instead of the keys",
    ),
    Mutant(
        id="attention-softmax-in-fp16",
        kind="worse",
        family="glm",
        apply=edited(GLM, EAGER, "dtype=torch.float32", "dtype=torch.float16"),
        expected_checks=("reference.local",),
        module_pattern=GLM_NAME,
        why="softmax in float16 in an fp32 model",
    ),
    Mutant(
        id="attention-scores-in-bf16",
        kind="worse",
        family="glm4",
        apply=edited(
            GLM,
            EAGER,
            SCORES,
            SCORES.replace("query,", "query.bfloat16(),").replace("key_states.", "key_states.bfloat16().")
            + "; attn_weights = attn_weights.to(query.dtype)",
        ),
        expected_checks=("reference.local",),
        module_pattern=GLM_NAME,
        why="scores are computed in bfloat16 in an fp32 model",
    ),
    Mutant(
        id="attention-softmax-without-fp32",
        family="glm",
        precision="bf16",
        apply=edited(GLM, EAGER, ", dtype=torch.float32", ""),
        expected_checks=(),
        equivalent=True,
        why="torch's bfloat16 softmax sums in float32 and rounds once, as the cast back does: 1.15 roundoffs either way",
    ),
    Mutant(
        id="attention-soft-cap",
        family="glm4",
        apply=edited(GLM, EAGER, SCORES, SCORES + "; attn_weights = 30 * torch.tanh(attn_weights / 30)"),
        expected_checks=("forward.attention", ORACLE),
        module_pattern=GLM_NAME,
        why="Gemma's soft cap on the scores",
    ),
    Mutant(
        id="attention-soft-cap-everywhere",
        family="glm4",
        attn="sdpa",
        apply=edited(
            GLM, "forward", "attn_output = self.o_proj(attn_output)", "attn_output = self.o_proj(attn_output.tanh())"
        ),
        expected_checks=(ORACLE,),
        module_pattern=GLM_NAME + r"(\.o_proj)?",
        why="an activation before the output projection, in every implementation",
    ),
    Mutant(
        id="attention-dropout-left-on",
        family="glm",
        apply=edited(GLM, EAGER, "p=dropout, training=module.training", "p=0.1, training=True"),
        expected_checks=("forward.deterministic",),
        module_pattern=GLM_NAME,
        why="dropout of the weights also in eval mode",
    ),
    Mutant(
        id="attention-query-bias-dropped",
        family="glm",
        apply=edited(
            GLM, "forward", "self.q_proj(hidden_states)", "nn.functional.linear(hidden_states, self.q_proj.weight)"
        ),
        expected_checks=("train.grad-flow", ORACLE),
        module_pattern=GLM_NAME + r"(\.q_proj)?",
        why="the bias of the queries is not added",
    ),
    Mutant(
        id="attention-key-bias-dropped",
        family="glm",
        apply=on(GLM + ".k_proj", lambda linear: setattr(linear, "bias", None)),
        expected_checks=("load.roundtrip", ORACLE),
        module_pattern=GLM_NAME + r"(\.k_proj)?",
        why="the keys' bias is built away",
    ),
    Mutant(
        id="mask-ignored",
        family="glm",
        apply=edited(GLM, EAGER, "if attention_mask is not None:", "if False:"),
        expected_checks=("forward.causal",),
        module_pattern=GLM_NAME,
        why="eager attention adds no mask",
    ),
    Mutant(
        id="mask-value-too-small",
        family="glm4",
        apply=edited(GLM, EAGER, WITH_MASK, WITH_MASK + ".clamp(min=-10.0)"),
        expected_checks=("forward.causal",),
        module_pattern=GLM_NAME,
        why="masked scores get -10: one part in 20,000 of the future leaks",
    ),
    Mutant(
        id="mask-value-minus-ten-thousand",
        family="glm",
        apply=edited(GLM, EAGER, WITH_MASK, WITH_MASK + ".clamp(min=-10000.0)"),
        expected_checks=(),
        equivalent=True,
        why="exp(-10000) is 0 in every float, float64 too, and a row always has a key of its own",
    ),
    Mutant(
        id="mask-causal-one-late",
        family="glm",
        apply=edited(
            GLM,
            EAGER,
            WITH_MASK,
            "attn_weights = attn_weights + torch.cat((attention_mask[..., 1:, :], attention_mask[..., -1:, :]), dim=-2)",
        ),
        expected_checks=("forward.causal",),
        module_pattern=GLM_NAME,
        why="each query sees the next token too",
    ),
    Mutant(
        id="mask-causal-one-late-chatglm",
        family="chatglm",
        apply=edited(
            CHATGLM_BODY, "_allowed_keys", "(keys <= queries)[None, None]", "(keys <= queries + 1)[None, None]"
        ),
        expected_checks=("forward.causal",),
        module_pattern=FIRST_ATTENTION,
        why="keys up to the next position are allowed, in every implementation",
    ),
    Mutant(
        id="mask-causal-one-early-chatglm",
        family="chatglm",
        apply=edited(CHATGLM_BODY, "_allowed_keys", "(keys <= queries)[None, None]", "(keys < queries)[None, None]"),
        expected_checks=("forward.finite",),
        module_pattern=FIRST_ATTENTION,
        why="a query may not see itself, so the first one sees nothing: a fully masked row",
    ),
    Mutant(
        id="mask-window-of-sixteen",
        family="chatglm",
        apply=edited(
            CHATGLM_BODY,
            "_allowed_keys",
            "causal & (real",
            "causal & (keys > queries - 16)[None, None] & (real",
        ),
        expected_checks=(ORACLE,),
        module_pattern=FIRST_ATTENTION,
        why="a sliding window that config.json does not ask for",
    ),
    Mutant(
        id="mask-window-one-short",
        family="glm",
        apply=edited(
            GLM,
            EAGER,
            WITH_MASK,
            "attn_weights = attn_weights + attention_mask; "
            "attn_weights = attn_weights.masked_fill(torch.ones_like(attn_weights, dtype=torch.bool).tril(-63), -1e30)",
        ),
        expected_checks=("forward.attention", ORACLE),
        module_pattern=GLM_NAME,
        why="a window of 63 where 64 tokens are visible: only the last query of a full row loses its first key",
    ),
    Mutant(
        id="mask-padding-ignored",
        family="chatglm",
        apply=edited(
            CHATGLM_BODY, "_allowed_keys", "real = attention_mask != 0", "real = torch.ones_like(attention_mask) != 0"
        ),
        expected_checks=("forward.padding",),
        module_pattern=FIRST_ATTENTION,
        why="padding is attended to",
    ),
    Mutant(
        id="mask-padding-shifted",
        family="chatglm",
        apply=edited(
            CHATGLM_BODY, "_allowed_keys", "real = attention_mask != 0", "real = attention_mask.roll(1, -1) != 0"
        ),
        expected_checks=("forward.padding", ORACLE),
        module_pattern=FIRST_ATTENTION,
        why="the padding mask is off by one column",
    ),
    Mutant(
        id="mask-padded-query-sees-nothing",
        family="chatglm",
        apply=edited(CHATGLM_BODY, "_allowed_keys", CAUSAL, "causal & real[:, None, None, :]"),
        expected_checks=("forward.finite",),
        module_pattern=FIRST_ATTENTION,
        why="a padded query has no key at all: softmax over a fully masked row",
    ),
    Mutant(
        id="mask-of-the-first-row",
        family="glm4",
        apply=edited(GLM, EAGER, WITH_MASK, WITH_MASK + "[:1]"),
        expected_checks=("forward.batch", "forward.padding"),
        module_pattern=GLM_NAME,
        why="every row gets the first row's mask",
    ),
    Mutant(
        id="mask-dtype-dependent",
        kind="contract",
        family="chatglm",
        apply=edited(
            CHATGLM_BODY,
            "_allowed_keys",
            "real = attention_mask != 0",
            "real = attention_mask != 0 if attention_mask.dtype != torch.bool else torch.ones_like(attention_mask)",
        ),
        expected_checks=("inputs.mask-dtype",),
        why="a boolean mask is taken for an inverted one and dropped; the model as a whole is at fault",
    ),
    Mutant(
        id="batch-values-centred",
        family="glm4",
        apply=edited(
            GLM,
            "forward",
            "cos, sin = position_embeddings",
            "value_states = value_states - value_states.mean(0, keepdim=True)\n        cos, sin = position_embeddings",
        ),
        expected_checks=("forward.batch", ORACLE),
        module_pattern=GLM_NAME,
        why="a mean over the batch is taken off the values: rows leak into one another",
    ),
)
