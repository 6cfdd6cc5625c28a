"""Runs `numerics-suite` in a process whose flash op of the CPU errs by the share that the first argument says.

The kernel is replaced in PyTorch's own dispatcher, so that it errs for every caller and in every float, float64 too. Each
element errs by its own fixed share: a second run of it agrees with the first.
"""

from __future__ import annotations

import math
import sys
import warnings

import torch
from torch import Tensor

from numerics_suite.cli.main import main

SHARE = float(sys.argv[1])


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`softmax(scale · Q Kᵀ + mask) V` in float32 at least, rounded once, then off by `SHARE`."""
    wide = torch.float64 if query.dtype is torch.float64 else torch.float32
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.to(wide).repeat_interleave(groups, dim=1) for tensor in (key, value))
    scores = query.to(wide) @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        scores = scores + attn_mask
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    out = scores.softmax(dim=-1).nan_to_num(0.0) @ value
    pattern = torch.arange(out.numel(), dtype=wide).reshape(out.shape).sin() * math.sqrt(2)
    lse = scores.logsumexp(dim=-1)
    # The backward kernel wants 0, as the forward one gives it, of a query that sees no key.
    return (out * (1 + SHARE * pattern)).to(query.dtype), lse.masked_fill(lse == -math.inf, 0.0)


if __name__ == "__main__":
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that a kernel is replaced, which is what is meant
        library.impl("_scaled_dot_product_flash_attention_for_cpu", flash, "CPU")
    raise SystemExit(main(sys.argv[2:]))
