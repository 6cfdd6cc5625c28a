"""inputs.pipeline."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.evidence import Evidence
from numerics_suite.subjects.tokenizers import TokenizerRefusedError, load_tokenizer

TEXTS = (
    "The logits are finite.",
    "Gradients blow up when the loss scale is never lowered, and nobody looks at them until step two.",
    "数值稳定性",
    "x",
)

UNLIKELY_BITS = 20


@check(scope="precision", of_broken=True)
def pipeline(evidence: Evidence) -> Iterable[Measurement]:
    """Is what tokenizer, collator and accelerate hand to the model integral and in range?"""
    refused = _tokenizer_refused(evidence)
    yield refused
    batches = dict(_batches(evidence))
    if not batches and not refused.value:
        reason = "no tokenizer and no batch of its own"
        raise NotApplicableError(reason)
    floating, outside, rounded = [], [], []
    for origin, tensors in batches.items():
        for name in ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids"):
            value = tensors.get(name)
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not _real_labels(evidence, name):
                floating.append(f"{name} of {origin} is {str(value.dtype).removeprefix('torch.')}")
        ids = tensors.get("input_ids")
        if isinstance(ids, torch.Tensor) and not ids.is_floating_point() and evidence.takes_ids:
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= evidence.vocab_size):
                outside.append(f"{origin}: {int(ids.min())} to {int(ids.max())}, vocabulary {evidence.vocab_size}")
            rounded += [origin] if _looks_rounded(ids) else []
    yield _count("floating", floating, "tensors")
    yield _count("out-of-range", outside, "batches")
    yield _count("looks-rounded", rounded, "batches")


def _count(name: str, found: list[str], unit: str) -> Measurement:
    return Measurement(name=name, value=len(found), unit=unit, facts={"where": "; ".join(found)} if found else {})


def _real_labels(evidence: Evidence, name: str) -> bool:
    """Regression labels are floating by definition."""
    return name == "labels" and (evidence.num_labels == 1 or not evidence.takes_ids)


def _looks_rounded(ids: torch.Tensor) -> bool:
    """Whether the ids all equal their own bfloat16 rounding, and by chance would with a probability below 2**-20.

    bfloat16 holds 128 of the 2**k integers from 2**k on, so an id there is such a number with probability 2**-(k - 7).
    """
    large = torch.unique(ids[ids > 256])
    if large.numel() == 0 or not bool((large.to(torch.bfloat16).to(large.dtype) == large).all()):
        return False
    return sum(int(token).bit_length() - 1 - 7 for token in large.tolist()) >= UNLIKELY_BITS


def _tokenizer_refused(evidence: Evidence) -> Measurement:
    refused = ""
    if evidence.subject.path is not None:
        try:
            load_tokenizer(evidence.subject)
        except TokenizerRefusedError as error:
            refused = str(error)
    return Measurement(
        name="tokenizer-refused", value=int(bool(refused)), unit="tokenizers", facts={"why": refused} if refused else {}
    )


def _batches(evidence: Evidence) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if evidence.own_batch is not None:
        yield evidence.own_batch.drawn, evidence.own_batch.tensors
    if evidence.subject.path is None:
        return
    try:
        tokenizer = load_tokenizer(evidence.subject)
    except TokenizerRefusedError:
        return
    if tokenizer is None:
        return
    encoded = [tokenizer(text) for text in TEXTS]
    collated = _collate(evidence, tokenizer, encoded)
    yield "the collator", collated
    if importlib.util.find_spec("accelerate") is not None:
        from accelerate.utils import convert_outputs_to_fp32, send_to_device

        yield "accelerate", send_to_device(collated, evidence.condition.main_device)
        yield "accelerate's fp32 conversion", convert_outputs_to_fp32(lambda: dict(collated))()


def _collate(evidence: Evidence, tokenizer: Any, encoded: list[Any]) -> dict[str, Any]:
    from transformers import DataCollatorWithPadding

    if tokenizer.pad_token is None:
        longest = max(len(item["input_ids"]) for item in encoded)
        encoded = [item for item in encoded if len(item["input_ids"]) == longest]
    rows = [dict(item) for item in encoded]
    if evidence.subject.task == "sequence-classification":
        for index, row in enumerate(rows):
            row["label"] = index % max(evidence.num_labels, 1)
    return dict(DataCollatorWithPadding(tokenizer, return_tensors="pt")(rows))
