"""Mistakes in the loss. No module is at fault in one, so none need be named."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mutants.catalogue.record import ORACLE, Mutant
from mutants.editing import edited, other_loss

CHATGLM_LABELS = "labels[:, 1:].flatten().to(logits.device)"
MEAN = "return F.cross_entropy(shifted, targets, ignore_index=-100)"


def _not_shifted(own: Any, *, logits: Any, labels: Any, **kwargs: Any) -> Any:
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)


def _shifted_twice(own: Any, *, labels: Any, **kwargs: Any) -> Any:
    return own(labels=nn.functional.pad(labels[:, 1:], (0, 1), value=-100), **kwargs)


def _over_all_labels(own: Any, *, labels: Any, **kwargs: Any) -> Any:
    counted = labels[:, 1:] != -100
    return own(labels=labels, **kwargs) * counted.sum() / counted.numel()


def _mean_of_row_means(own: Any, *, logits: Any, labels: Any, **kwargs: Any) -> Any:
    rows = [
        own(logits=x[None], labels=y[None], **kwargs)
        for x, y in zip(logits, labels, strict=True)
        if (y[1:] != -100).any()
    ]
    return torch.stack(rows).mean() if rows else own(logits=logits, labels=labels, **kwargs)


def _smoothed(own: Any, *, logits: Any, labels: Any, **kwargs: Any) -> Any:
    flat, wanted = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
    return nn.functional.cross_entropy(flat, wanted, ignore_index=-100, label_smoothing=0.1)


def _in_bf16(own: Any, *, logits: Any, **kwargs: Any) -> Any:
    return own(logits=logits.bfloat16().to(logits.dtype), **kwargs)


def _with_z_loss(own: Any, *, logits: Any, **kwargs: Any) -> Any:
    return own(logits=logits, **kwargs) + 1e-4 * logits.float().logsumexp(-1).square().mean()


def _last_row_dropped(own: Any, *, logits: Any, labels: Any, **kwargs: Any) -> Any:
    keep = max(1, labels.shape[0] - 1)
    return own(logits=logits[:keep], labels=labels[:keep], **kwargs)


def _inputs_scored(own: Any, *, pooled_logits: Any, **kwargs: Any) -> Any:
    return own(pooled_logits=pooled_logits.log_softmax(-1).exp(), **kwargs)


MUTANTS = (
    Mutant(
        id="loss-swallows-the-count",
        family="chatglm",
        apply=edited(
            "", "forward", "_causal_loss(logits, labels, num_items_in_batch)", "_causal_loss(logits, labels, None)"
        ),
        expected_checks=("train.trainer",),
        why="the class takes num_items_in_batch and does not hand it to its loss, so that accumulation adds up means",
    ),
    Mutant(
        id="loss-labels-not-shifted",
        family="glm",
        apply=other_loss(_not_shifted),
        expected_checks=("train.labels", ORACLE),
        why="each token predicts itself",
    ),
    Mutant(
        id="loss-labels-shifted-twice",
        family="glm4",
        apply=other_loss(_shifted_twice),
        expected_checks=("train.labels", ORACLE),
        why="labels shifted in the collator and again in the model",
    ),
    Mutant(
        id="loss-labels-not-shifted-chatglm",
        family="chatglm",
        apply=edited("", "_causal_loss", CHATGLM_LABELS, "labels[:, :-1].flatten().to(logits.device)"),
        expected_checks=("train.labels", ORACLE),
        why="logits are cut and labels are not shifted",
    ),
    Mutant(
        id="loss-mean-over-ignored-labels",
        family="glm",
        apply=other_loss(_over_all_labels),
        expected_checks=("train.labels", "train.accumulation", ORACLE),
        why="divided by all labels, ignored ones too",
    ),
    Mutant(
        id="loss-ignored-labels-count",
        family="chatglm",
        apply=edited("", "_causal_loss", CHATGLM_LABELS, CHATGLM_LABELS + ".clamp(min=0)"),
        expected_checks=("train.labels", ORACLE),
        why="ignored labels are scored as id 0",
    ),
    Mutant(
        id="loss-sum-for-mean",
        family="chatglm",
        apply=edited("", "_causal_loss", MEAN, MEAN[:-1] + ', reduction="sum")'),
        expected_checks=("train.labels", "train.accumulation", ORACLE),
        why="the sum over tokens",
    ),
    Mutant(
        id="loss-mean-of-row-means",
        family="glm4",
        apply=other_loss(_mean_of_row_means),
        expected_checks=("train.labels", "train.accumulation", ORACLE),
        why="rows weigh alike whatever they count",
    ),
    Mutant(
        id="loss-label-smoothing",
        family="glm",
        apply=other_loss(_smoothed),
        expected_checks=("train.labels", ORACLE),
        why="label smoothing of 0.1 left in",
    ),
    Mutant(
        id="loss-in-bf16",
        kind="worse",
        family="glm4",
        apply=other_loss(_in_bf16),
        expected_checks=("train.labels",),
        why="the loss is computed from logits rounded to bfloat16 in an fp32 model",
    ),
    Mutant(
        id="loss-without-float32",
        kind="contract",
        family="chatglm",
        precision="bf16",
        apply=edited("", "_causal_loss", "logits[:, :-1].float()", "logits[:, :-1]"),
        expected_checks=(),
        equivalent=True,
        why="torch's bfloat16 cross entropy sums in float32 and rounds its result once; a bfloat16 loss is what the "
        "caller sees, off by less than one of its roundoffs",
    ),
    Mutant(
        id="loss-with-z-loss",
        family="glm",
        apply=other_loss(_with_z_loss),
        expected_checks=("train.labels", ORACLE),
        why="a z-loss of 1e-4 left in from pre-training",
    ),
    Mutant(
        id="loss-last-row-dropped",
        family="glm4",
        apply=other_loss(_last_row_dropped),
        expected_checks=("train.labels", "train.accumulation", ORACLE),
        why="the last row of a batch does not count",
    ),
    Mutant(
        id="loss-without-labels",
        kind="contract",
        family="chatglm",
        apply=edited(
            "",
            "forward",
            "loss=None if labels is None else _causal_loss(logits, labels, num_items_in_batch)",
            "loss=_causal_loss(logits, input_ids if labels is None else labels, num_items_in_batch)",
        ),
        expected_checks=("train.labels",),
        why="without labels the input ids are taken for them",
    ),
    Mutant(
        id="loss-labels-leak-into-logits",
        family="chatglm",
        apply=edited(
            "",
            "forward",
            "output = CausalLMOutputWithPast(",
            "logits = logits if labels is None else logits.scatter_add(-1, labels.clamp(min=0)[..., None], "
            "torch.full_like(logits[..., :1], 1e-3))\n        output = CausalLMOutputWithPast(",
        ),
        expected_checks=("train.labels",),
        why="labels are added to the logits that they are compared with",
    ),
    Mutant(
        id="loss-of-probabilities",
        family="glm",
        task="sequence-classification",
        apply=other_loss(_inputs_scored),
        expected_checks=("train.labels", ORACLE),
        why="the classifier's loss takes the softmax twice",
    ),
    Mutant(
        id="loss-per-label-chatglm",
        family="chatglm",
        task="sequence-classification",
        apply=edited(
            "",
            "_classification_loss",
            "return F.cross_entropy(logits.view(-1, config.num_labels), labels.view(-1).long())",
            "return F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, config.num_labels).to(logits.dtype))",
        ),
        expected_checks=("train.labels", ORACLE),
        why="the loss of independent labels where exactly one is right",
    ),
)
