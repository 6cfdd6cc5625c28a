"""Mistakes in the rotary embedding."""

from __future__ import annotations

from typing import Any

import torch

from mutants.catalogue.record import ORACLE, Mutant
from mutants.editing import edited, on, overridden

ATTENTION, CHATGLM = "model.layers.1.self_attn", "transformer.encoder.layers.1.self_attention"
ATTENTION_NAME, CHATGLM_NAME = ATTENTION.replace(".", r"\."), CHATGLM.replace(".", r"\.")
TABLE, CHATGLM_TABLE = "model.rotary_emb", "transformer.rotary_pos_emb"
TABLE_NAME, CHATGLM_TABLE_NAME = TABLE.replace(".", r"\."), CHATGLM_TABLE.replace(".", r"\.")
ROTARY_DIM, HEAD_DIM = 8, 16


def _table(theta: float, dim: int, pairs: int) -> torch.Tensor:
    exponents = torch.arange(0, 2 * pairs, 2, dtype=torch.float64) / dim
    return (theta**-exponents).float()


def _frequencies(theta: float = 10000.0, dim: int = ROTARY_DIM, pairs: int = ROTARY_DIM // 2) -> Any:
    """Puts another table in; the dtype and the buffer stay."""

    def change(module: Any) -> None:
        module.inv_freq = _table(theta, dim, pairs).to(module.inv_freq.device)
        module.original_inv_freq = module.inv_freq.clone()

    return change


def _rounded(module: Any) -> None:
    module.inv_freq = module.inv_freq.bfloat16().float()


def _turned_back(own: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    cos, sin = own(self, *args, **kwargs)
    return cos, -sin


def _in_bf16(own: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    return tuple(value.bfloat16().to(value.dtype) for value in own(self, *args, **kwargs))


def _low_precision_angles(own: Any, self: Any, x: Any, position_ids: Any, *args: Any, **kwargs: Any) -> Any:
    """The angles as they come out where positions and frequencies are multiplied in the model's dtype."""
    freqs = position_ids[..., None].to(x.dtype) * self.inv_freq.to(x.dtype)
    emb = torch.cat((freqs, freqs), dim=-1)
    return emb.cos(), emb.sin()


def _attention_factor(own: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    return tuple(1.05 * value for value in own(self, *args, **kwargs))


MUTANTS = (
    Mutant(
        id="rope-theta",
        family="glm",
        apply=on(TABLE, _frequencies(theta=500000.0)),
        expected_checks=(ORACLE,),
        module_pattern=TABLE_NAME,
        why="another theta than config.json's",
    ),
    Mutant(
        id="rope-theta-by-a-hair",
        family="glm4",
        apply=on(TABLE, _frequencies(theta=10001.0)),
        expected_checks=(ORACLE,),
        module_pattern=TABLE_NAME,
        why="theta 10,001 instead of 10,000",
    ),
    Mutant(
        id="rope-ratio-ignored",
        family="chatglm",
        apply=on(CHATGLM_TABLE, _frequencies(theta=5000.0)),
        expected_checks=(ORACLE,),
        module_pattern=CHATGLM_TABLE_NAME,
        why="theta scaled by another rope_ratio than the config's",
    ),
    Mutant(
        id="rope-whole-head",
        family="glm",
        apply=on(TABLE, _frequencies(dim=HEAD_DIM, pairs=HEAD_DIM // 2)),
        expected_checks=(ORACLE,),
        module_pattern=TABLE_NAME,
        why="partial_rotary_factor ignored, as transformers 4.46 did: the whole head is rotated",
    ),
    Mutant(
        id="rope-exponent-of-whole-head",
        family="glm4",
        apply=on(TABLE, _frequencies(dim=HEAD_DIM)),
        expected_checks=(ORACLE,),
        module_pattern=TABLE_NAME,
        why="half the head is rotated, with the exponents of a whole one",
    ),
    Mutant(
        id="rope-table-in-bf16",
        family="glm",
        precision="bf16",
        apply=on(TABLE, _rounded),
        expected_checks=(ORACLE,),
        module_pattern=TABLE_NAME,
        why="model.to(bfloat16) rounds the frequencies to 8 bits",
    ),
    Mutant(
        id="rope-table-in-bf16-chatglm",
        family="chatglm",
        precision="bf16",
        apply=on(CHATGLM_TABLE, _rounded),
        expected_checks=(ORACLE,),
        module_pattern=CHATGLM_TABLE_NAME,
        why="the saved frequencies are cast with the weights",
    ),
    Mutant(
        id="rope-angles-in-bf16",
        kind="worse",
        family="glm4",
        precision="bf16",
        apply=overridden(TABLE, forward=_low_precision_angles),
        expected_checks=("reference.local",),
        module_pattern=TABLE_NAME,
        why="position times frequency in bfloat16: angles of late positions are off by radians",
    ),
    Mutant(
        id="rope-angles-in-fp16",
        kind="worse",
        family="glm",
        precision="fp16",
        apply=overridden(TABLE, forward=_low_precision_angles),
        expected_checks=("reference.local",),
        module_pattern=TABLE_NAME,
        why="position times frequency in float16",
    ),
    Mutant(
        id="rope-cosines-in-bf16",
        kind="worse",
        family="glm",
        apply=overridden(TABLE, forward=_in_bf16),
        expected_checks=("reference.local",),
        module_pattern=TABLE_NAME,
        why="cosines and sines pass through bfloat16 in an fp32 model",
    ),
    Mutant(
        id="rope-cosines-in-bf16-chatglm",
        kind="worse",
        family="chatglm",
        apply=edited(CHATGLM_TABLE, "forward", "angles.cos().to(dtype)", "angles.cos().bfloat16().to(dtype)"),
        expected_checks=("reference.local",),
        module_pattern=CHATGLM_TABLE_NAME,
        why="the cosines pass through bfloat16 in an fp32 model",
    ),
    Mutant(
        id="rope-backwards",
        family="glm4",
        apply=overridden(TABLE, forward=_turned_back),
        expected_checks=(ORACLE,),
        module_pattern=rf"{TABLE_NAME}|model\.layers\.0\.self_attn",
        why="the sines have the other sign: every law holds, and another model is computed",
    ),
    Mutant(
        id="rope-attention-factor",
        family="glm",
        apply=overridden(TABLE, forward=_attention_factor),
        expected_checks=(ORACLE,),
        module_pattern=rf"{TABLE_NAME}|model\.layers\.0\.self_attn",
        why="YaRN's attention factor on a plain rotary embedding",
    ),
    Mutant(
        id="rope-half-split",
        family="glm",
        apply=edited(
            ATTENTION,
            "rotate_half",
            "return torch.stack((-x2, x1), dim=-1).flatten(-2)",
            "half = x.shape[-1] // 2; return torch.cat((-x[..., half:], x[..., :half]), dim=-1)",
        ),
        expected_checks=("forward.padding", "forward.attention", ORACLE),
        module_pattern=ATTENTION_NAME,
        why="Llama's half-split rotation on GLM's interleaved cosines",
    ),
    Mutant(
        id="rope-pairs-split",
        family="chatglm",
        apply=edited(
            CHATGLM,
            "apply_rotary_pos_emb",
            "even, odd = rotated[..., 0::2], rotated[..., 1::2]",
            "even, odd = rotated.chunk(2, dim=-1)",
        ),
        expected_checks=(ORACLE,),
        module_pattern=CHATGLM_NAME,
        why="pairs are taken from the two halves instead of from neighbours: a rotation still, so every law holds",
    ),
    Mutant(
        id="rope-on-the-other-half",
        family="chatglm",
        apply=edited(
            CHATGLM,
            "apply_rotary_pos_emb",
            "torch.cat((rotated, passed), dim=-1)",
            "torch.cat((passed, rotated), dim=-1)",
        ),
        expected_checks=(),
        why="rotated and passed halves are put together in the other order, for queries and keys alike: no product of "
        "the two changes, so the scores are the same sums",
        equivalent=True,
    ),
    Mutant(
        id="rope-query-only",
        family="glm",
        apply=edited(
            ATTENTION, "apply_rotary_pos_emb", "k_embed = (k_rot * cos) + (rotate_half(k_rot) * sin)", "k_embed = k_rot"
        ),
        expected_checks=("forward.padding", ORACLE),
        module_pattern=ATTENTION_NAME,
        why="keys are not rotated",
    ),
    Mutant(
        id="rope-sign-of-one-term",
        family="glm4",
        apply=edited(
            ATTENTION,
            "apply_rotary_pos_emb",
            "q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)",
            "q_embed = (q_rot * cos) - (rotate_half(q_rot) * sin)",
        ),
        expected_checks=("forward.padding", ORACLE),
        module_pattern=ATTENTION_NAME,
        why="queries turn the other way than keys",
    ),
    Mutant(
        id="rope-query-one-ahead",
        family="chatglm",
        apply=edited(
            CHATGLM,
            "forward",
            "query, key = apply_rotary_pos_emb(query, *rotary)",
            "cos, sin = rotary; "
            "turn = torch.tensor([10000.0 ** (-i / 4) for i in range(4)], dtype=torch.float64).to(cos); "
            "ahead = (cos * turn.cos() - sin * turn.sin(), sin * turn.cos() + cos * turn.sin()); "
            "query, key = apply_rotary_pos_emb(query, *ahead)",
        ),
        expected_checks=(ORACLE,),
        module_pattern=CHATGLM_NAME,
        why="queries stand one position ahead of their keys: relative still, so every law holds",
    ),
    Mutant(
        id="rope-in-low-precision",
        kind="worse",
        family="glm",
        precision="fp32",
        apply=edited(
            ATTENTION,
            "apply_rotary_pos_emb",
            "q_embed = (q_rot * cos) + (rotate_half(q_rot) * sin)",
            "q_embed = ((q_rot.half() * cos.half()) + (rotate_half(q_rot.half()) * sin.half())).to(q.dtype)",
        ),
        expected_checks=("reference.local",),
        module_pattern=ATTENTION_NAME,
        why="the rotation itself runs in float16 in an fp32 model",
    ),
    Mutant(
        id="rope-positions-from-the-first-column",
        family="chatglm",
        apply=edited(
            "transformer",
            "forward",
            "position_ids = ((attention_mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, past:]",
            "position_ids = torch.arange(past, past + length, device=hidden_states.device)[None]",
        ),
        expected_checks=(),
        equivalent=True,
        why="positions ignore padding: a rotary embedding sees differences of positions only, and a whole row shifts",
    ),
    Mutant(
        id="rope-autocast-left-on",
        family="chatglm",
        precision="amp-bf16",
        apply=edited(CHATGLM_TABLE, "forward", "enabled=False", "enabled=True"),
        expected_checks=(),
        equivalent=True,
        why="autocast lowers matrix products; the table is made of element-wise ops, which it leaves in float32",
    ),
)
