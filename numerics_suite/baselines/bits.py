"""SHA-256 over the raw bytes that the cell computes in its own precision, at real tokens."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from numerics_suite.baselines.batches import real_tokens
from numerics_suite.baselines.trace import real_rows
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.running.evidence import Evidence
from numerics_suite.running.forward import arithmetic, backward_arithmetic, call_model, floating_outputs, main_output

SCALE: Final = 65536.0
"""Torch's first loss scale, a power of two: it moves no bit of a gradient that does not overflow or underflow."""

SINGLE_STEPS: Final = 4
"""Tokens that are decoded one by one after the prefill."""


def digest(tensors: Iterable[Tensor]) -> str:
    """Of the tensors' dtypes, shapes and bytes, in their order.

    Args:
        tensors: of any dtype, on any device.
    """
    found = hashlib.sha256()
    for tensor in tensors:
        held = tensor.detach().cpu().contiguous()
        found.update(f"{held.dtype}{tuple(held.shape)}".encode())
        found.update(held.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_of_digests(bits: Mapping[str, str]) -> str:
    """One for all parts."""
    return hashlib.sha256(repr(sorted(bits.items())).encode()).hexdigest()


def loss_and_gradients(
    evidence: Evidence, model: nn.Module, tensors: Mapping[str, Any], *, gradients: bool
) -> dict[str, str]:
    """Digests of `loss` and `gradients` of the training batch under the cell's recipe.

    Args:
        evidence: of the cell.
        model: whose parameters get gradients; they are taken away again.
        tensors: the batch with its labels.
        gradients: False where the precision is not for training.
    """
    scale = SCALE if evidence.recipe.loss_scaling else 1.0
    with torch.set_grad_enabled(gradients), arithmetic(evidence.recipe, evidence.cell.device):
        output = floating_outputs(call_model(model, tensors))
        loss = output["loss"] if "loss" in output else main_output(output)[1].float().square().mean()
    found = {"loss": digest([loss])}
    if gradients:
        with backward_arithmetic(evidence.recipe):
            (loss * scale).backward()  # type: ignore[no-untyped-call]
        found["gradients"] = digest(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)
        model.zero_grad(set_to_none=True)
    return found


def decoded(evidence: Evidence, tensors: Mapping[str, Any]) -> Tensor:
    """The logits of a prefill and of single steps with the model's own cache, at real tokens, `[tokens, vocabulary]`.

    Args:
        evidence: of a causal language model's cell.
        tensors: a batch without labels.

    Raises:
        NotApplicableError: the model keeps no cache.
    """
    ids = tensors["input_ids"]
    real = real_tokens(tensors)
    assert real is not None
    mask = tensors.get("attention_mask", torch.ones_like(ids))
    width = ids.shape[1]
    first = max(1, width - SINGLE_STEPS)
    cached, logits = None, []
    for start, stop in itertools.pairwise([0, *range(first, width + 1)]):
        piece = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
        output = evidence.run(piece, use_cache=True, past_key_values=cached)
        cached = getattr(output, "past_key_values", None)
        if cached is None:
            reason = "the model keeps no cache"
            raise NotApplicableError(reason)
        logits.append(output["logits"])
    return real_rows(tensors, torch.cat(logits, dim=1))
