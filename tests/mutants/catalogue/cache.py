"""Mistakes in decoding with the cache."""

from __future__ import annotations

from typing import Any

from mutants.catalogue.record import Mutant
from mutants.editing import edited, overridden

CHATGLM, CHATGLM_BODY = "transformer.encoder.layers.1.self_attention", "transformer"
UPDATE = "past_key_values.update(key, value, self.layer_idx)"
POSITIONS = ".clamp(min=0)[:, past:]"
FIRST_ATTENTION = r"transformer\.encoder\.layers\.0\.self_attention"
"""The first module that what the model's own forward pass prepares is handed to."""


def _one_ahead(own: Any, self: Any, x: Any, position_ids: Any, *args: Any, **kwargs: Any) -> Any:
    return own(self, x, position_ids + int(x.shape[1] == 1), *args, **kwargs)


def _remembers(own: Any, self: Any, x: Any) -> Any:
    self.calls = getattr(self, "calls", 0) + 1
    return own(self, x) * (1 + 1e-6 * self.calls)


MUTANTS = (
    Mutant(
        id="cache-position-one-ahead",
        family="glm",
        apply=overridden("model.rotary_emb", forward=_one_ahead),
        expected_checks=("forward.cache",),
        module_pattern=r"model\.rotary_emb",
        why="a single decoded token stands one position too far",
    ),
    Mutant(
        id="cache-position-one-ahead-glm4",
        family="glm4",
        attn="sdpa",
        apply=overridden("model.rotary_emb", forward=_one_ahead),
        expected_checks=("forward.cache",),
        module_pattern=r"model\.rotary_emb",
        why="a single decoded token stands one position too far",
    ),
    Mutant(
        id="cache-position-one-ahead-chatglm",
        family="chatglm",
        apply=edited(CHATGLM_BODY, "forward", POSITIONS, POSITIONS + " + int(past > 0)"),
        expected_checks=("forward.cache",),
        module_pattern=FIRST_ATTENTION,
        why="positions are counted from 1 once there is a cache",
    ),
    Mutant(
        id="cache-positions-ignore-padding",
        family="chatglm",
        apply=edited(
            CHATGLM_BODY,
            "forward",
            "if attention_mask is None:\n                position_ids",
            "if attention_mask is None or past > 0:\n                position_ids",
        ),
        expected_checks=("forward.cache",),
        module_pattern=FIRST_ATTENTION,
        why="decoded tokens count padding columns, the prompt does not",
    ),
    Mutant(
        id="cache-keys-in-bf16",
        kind="worse",
        family="chatglm",
        apply=edited(CHATGLM, "forward", UPDATE, UPDATE.replace("(key,", "(key.bfloat16().to(key.dtype),")),
        expected_checks=("forward.cache",),
        why="keys pass through bfloat16 on their way into the cache of an fp32 model; in true fp64 the law holds, so no module is looked for",
    ),
    Mutant(
        id="cache-without-rotation",
        family="chatglm",
        apply=edited(
            CHATGLM,
            "forward",
            "query, key = apply_rotary_pos_emb(query, *rotary), apply_rotary_pos_emb(key, *rotary)",
            "plain = key; query, key = apply_rotary_pos_emb(query, *rotary), apply_rotary_pos_emb(key, *rotary); "
            "key = plain if past_key_values is not None and past_key_values.get_seq_length(self.layer_idx) else key",
        ),
        expected_checks=("forward.cache",),
        module_pattern=CHATGLM.replace(".", r"\."),
        why="keys of decoded tokens are stored unrotated",
    ),
    Mutant(
        id="cache-mask-from-the-start",
        family="chatglm",
        apply=edited(
            CHATGLM_BODY,
            "_allowed_keys",
            "torch.arange(past, past + length, device=device)[:, None]",
            "torch.arange(length, device=device)[:, None]",
        ),
        expected_checks=("forward.cache",),
        module_pattern=FIRST_ATTENTION,
        why="the causal mask of a decoded piece starts at column 0",
    ),
    Mutant(
        id="cache-padding-forgotten",
        family="chatglm",
        apply=edited(
            CHATGLM_BODY,
            "_allowed_keys",
            "real = attention_mask != 0",
            "real = (attention_mask != 0) | bool(past)",
        ),
        expected_checks=("forward.cache",),
        module_pattern=FIRST_ATTENTION,
        why="once there is a cache, padding is attended to",
    ),
    Mutant(
        id="cache-values-of-new-tokens-only",
        family="chatglm",
        attn="sdpa",
        apply=edited(
            CHATGLM,
            "forward",
            "key, value = past_key_values.update(key, value, self.layer_idx)",
            "fresh = value; key, value = past_key_values.update(key, value, self.layer_idx); "
            "value = value.clone(); value[:, :, -fresh.shape[2] :] = fresh.roll(1, 2)",
        ),
        expected_checks=("forward.cache",),
        module_pattern=CHATGLM.replace(".", r"\."),
        why="values of a decoded piece are stored one place late",
    ),
    Mutant(
        id="cache-chunk-mask-causal-only-at-start",
        family="chatglm",
        attn="sdpa",
        apply=edited(
            CHATGLM_BODY,
            "_allowed_keys",
            "causal = (keys <= queries)[None, None]",
            "causal = (keys <= (queries if past == 0 else past + length))[None, None]",
        ),
        expected_checks=("forward.cache",),
        module_pattern=FIRST_ATTENTION,
        why="within a decoded chunk the future is visible",
    ),
    Mutant(
        id="state-kept-between-calls",
        family="glm",
        apply=overridden("model.norm", forward=_remembers),
        expected_checks=("forward.deterministic",),
        module_pattern=r"model\.norm",
        why="a counter that survives the call enters the states",
    ),
    Mutant(
        id="cache-slots-swapped",
        family="chatglm",
        apply=lambda model: (
            [
                setattr(model.get_submodule(f"transformer.encoder.layers.{own}.self_attention"), "layer_idx", other)
                for own, other in ((1, 2), (2, 1))
            ]
            and None
        ),
        expected_checks=(),
        equivalent=True,
        why="blocks 1 and 2 keep their keys in each other's slot of the cache: a slot is a label",
    ),
)
