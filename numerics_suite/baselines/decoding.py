"""Decoding with the model's own cache: a prefill, a chunk, single steps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.engine.decoding import NO_CACHE, cache_in
from numerics_suite.engine.router_loss import without_router_loss
from numerics_suite.subjects.generation import cache_name

PIECES: Final = (2, 1, 1)
"""Tokens that are decoded at a time after the prefill: a chunk, as assisted decoding checks one, and single steps."""


def decoded(run: Callable[..., Any], tensors: Mapping[str, Any], model: nn.Module) -> Tensor:
    """The logits of a chunk and of single steps after a prefill, with the model's own cache, `[tokens, vocabulary]`.

    Raises:
        NotApplicableError: the model keeps no cache.
    """
    ids = tensors["input_ids"]
    mask = tensors.get("attention_mask", torch.ones_like(ids))
    width = ids.shape[1]
    ends = [0, *(end for end in itertools.accumulate((width - sum(PIECES), *PIECES)) if end > 0)]
    name = cache_name(model)
    if name is None:
        raise NotApplicableError(NO_CACHE)
    cached, logits = None, []
    # The router's loss takes a mask as long as the ids, which no step of decoding has.
    with without_router_loss(model):
        for start, stop in itertools.pairwise(ends):
            piece = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            output = run(piece, use_cache=True, **{name: cached})
            cached = cache_in(output, name)
            if cached is None:
                raise NotApplicableError(NO_CACHE)
            if start or stop == width:
                logits.append(output["logits"])
    answer = torch.cat(logits, dim=1)
    return answer[mask[:, width - answer.shape[1] :].bool()]
