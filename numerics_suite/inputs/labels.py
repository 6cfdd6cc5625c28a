"""Counts the labels that contribute to a loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from numerics_suite.subjects.built_model import without_adapter

IGNORED = -100
"""The label that torch's cross entropy ignores."""


def counted_labels(labels: Tensor, *, shifted: bool) -> Tensor:
    """How many labels of each row count: the mean over none is 0/0.

    Args:
        labels: `[batch, sequence]` or `[batch]`, integers; floating ones are targets of a regression, and all count.
        shifted: the loss is that of the next token, so the first column is no target.

    Returns:
        int64 `[batch]`.
    """
    rows = labels.reshape(labels.shape[0], -1) if labels.dim() else labels.reshape(1, 1)
    return (rows[:, 1:] if shifted and labels.dim() > 1 else rows).ne(IGNORED).sum(dim=1)


def labels_in_mean(labels: Tensor, task: str) -> int:
    """Labels of a batch that enter the mean of its loss: after the shift for language models, all rows of a sequence classifier.

    Args:
        labels: `[batch, sequence]`, or of a sequence classifier `[batch]` or `[batch, labels]`.
        task: of the subject.
    """
    if task == "sequence-classification":
        return int(labels.shape[0])
    return int(counted_labels(labels, shifted=task == "causal-lm").sum())


def predicts_next_token(model: Any) -> bool:
    """Whether the model's own loss shifts the labels by one, as its class's name says."""
    return type(without_adapter(model)).__name__.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def empty_batches(counted: Sequence[int], *, batch: int, rows: int) -> float:
    """How many batches of one epoch are expected to have no label that counts.

    A batch of B rows is drawn without replacement, so if e of n sampled rows have no such label, a share of C(e, B) /
    C(n, B) of the batches has none: the unbiased estimate for the file (hypergeometric distribution).

    Args:
        counted: labels that count in each row of a random sample of the file.
        batch: rows of a training batch.
        rows: of the file.
    """
    sample, empty = len(counted), sum(not count for count in counted)
    batch = min(batch, sample)
    return math.comb(empty, batch) / math.comb(sample, batch) * max(rows, sample) / batch


def no_label_counts(tensors: Mapping[str, Any], *, shifted: bool) -> bool:
    """Whether a batch has integral labels of which none counts.

    Args:
        tensors: what a model is called with.
        shifted: see :func:`counted_labels`.
    """
    labels = tensors.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dtype == torch.bool or not labels.numel():
        return False
    return not bool(counted_labels(labels, shifted=shifted).any())
