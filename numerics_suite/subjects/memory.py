"""How much memory will a cell need? From headers and config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numerics_suite.core.records import Subject

_WIDTHS: Mapping[str, int] = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
TRAINING_COPIES = 4
"""Parameters, gradients and AdamW's two moments, all in the parameters' dtype."""
KEPT_PER_BLOCK = 16
"""Hidden-sized tensors that one block keeps for its backward pass: norms, q, k, v, output, gate, up, product, residuals."""


def estimate_bytes(subject: Subject, dtype: str, *, training: bool, batch: int, seq: int) -> int | None:
    """Estimated bytes of one model at work, None where the number of parameters is unknown.

    Args:
        subject: resolved.
        dtype: of the parameters, as torch names it.
        training: with gradients, optimizer state and what the backward pass keeps.
        batch: rows.
        seq: tokens of a row.
    """
    if subject.parameters is None:
        return None
    width = _WIDTHS.get(dtype, 4)
    weights = subject.parameters * width * (TRAINING_COPIES if training else 1)
    return weights + _activations(subject, width, training=training, batch=batch, seq=seq)


def _activations(subject: Subject, width: int, *, training: bool, batch: int, seq: int) -> int:
    config = subject.config
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    layers = _number(config, "num_hidden_layers", "num_layers", "n_layer")
    heads = _number(config, "num_attention_heads", "n_head")
    tokens = batch * seq
    block = tokens * hidden * KEPT_PER_BLOCK * width + batch * heads * seq * seq * 4  # eager's scores are float32
    vocabulary = (
        _number(config, "vocab_size", "padded_vocab_size") if subject.task == "causal-lm" else subject.num_labels
    )
    logits = tokens * vocabulary * (width + 4)  # and a float32 copy for the loss
    return block * (layers if training else 1) + logits * (2 if training else 1)


def _number(config: Mapping[str, Any], *keys: str) -> int:
    """The first of the keys that holds a number, 0 where none does."""
    found = next((config[key] for key in keys if isinstance(config.get(key), int)), 0)
    return int(found)
