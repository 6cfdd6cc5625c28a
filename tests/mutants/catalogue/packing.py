"""Mistakes that rows packed into one row show, and no batch of padded rows does."""

from __future__ import annotations

from typing import Any

import torch

from mutants.catalogue.record import Mutant
from mutants.editing import overridden

GLM, GLM_NAME = "model.layers.1.self_attn", r"model\.layers\.1\.self_attn"


def _with_a_mask(own: Any, self: Any, input_ids: Any = None, attention_mask: Any = None, **given: Any) -> Any:
    """A mask of ones where none is given, as code has it that counts positions by the mask."""
    return own(self, input_ids, torch.ones_like(input_ids) if attention_mask is None else attention_mask, **given)


def _by_its_last_row(own: Any, self: Any, *args: Any, attention_mask: Any = None, **given: Any) -> Any:
    """What the last query sees, and no later token: the same mask wherever that is all that it says."""
    if attention_mask is not None and attention_mask.dim() == 4:
        queries, keys = attention_mask.shape[-2:]
        later = torch.ones(queries, keys, dtype=torch.bool).triu(keys - queries + 1)
        seen = attention_mask[..., -1:, :].expand(attention_mask.shape)
        attention_mask = seen.masked_fill(later, torch.finfo(seen.dtype).min)
    return own(self, *args, attention_mask=attention_mask, **given)


MUTANTS = (
    Mutant(
        id="packing-positions-ignored-by-the-mask",
        family="glm",
        attn="sdpa",
        apply=overridden("model", forward=_with_a_mask),
        expected_checks=("forward.packing",),
        module_pattern=r"model\.layers\.0\.self_attn",
        why="a mask of ones is made where none is given, so positions that start again separate nothing",
        kind="contract",
    ),
    Mutant(
        id="packing-mask-read-by-its-last-row",
        family="glm4",
        apply=overridden(GLM, forward=_by_its_last_row),
        expected_checks=("forward.packing",),
        module_pattern=GLM_NAME,
        why="a 4-D mask is taken for one of padding: what the last token sees, every token before it may see",
        kind="contract",
    ),
)
