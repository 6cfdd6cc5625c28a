"""The losses by their formulas, in float64."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from numerics_suite.core.records import Task

IGNORED = -100
"""The label that does not count: torch's and transformers' convention."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of `log Σ exp(logits) - logits[label]` over the labels that count; NaN where none does, by definition.

    Args:
        logits: `[…, K]`.
        labels: `[…]` int64, `IGNORED` where it does not count.
    """
    counted = labels != IGNORED
    logits, labels = logits[counted], labels[counted].long()
    return (logits.logsumexp(-1) - logits.gather(-1, labels[:, None]).squeeze(-1)).mean()


def loss_of(task: Task, config: Mapping[str, Any], logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that the task trains on.

    Args:
        task: a causal model's position t is judged by label t + 1; a classifier's rows by their own.
        config: for `problem_type` of a sequence classifier; without it one label means regression, floating labels
            mean several labels at once, and anything else means one label of K.
        logits: `[B, T, V]`, or `[B, K]` for sequence classification.
        labels: `[B, T]`, or `[B]` or `[B, K]`.
    """
    if task == "causal-lm":
        return cross_entropy(logits[:, :-1], labels[:, 1:])
    if task == "token-classification":
        return cross_entropy(logits, labels)
    guess = "multi_label_classification" if labels.is_floating_point() else "single_label_classification"
    kind = config.get("problem_type") or ("regression" if logits.shape[-1] == 1 else guess)
    if kind == "regression":
        return (logits - labels.to(logits.dtype).reshape(logits.shape)).square().mean()
    if kind == "multi_label_classification":
        signs = 1 - 2 * labels.to(logits.dtype)
        return functional.softplus(signs * logits).mean()
    return cross_entropy(logits, labels.reshape(-1))
