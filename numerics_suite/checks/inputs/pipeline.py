"""inputs.pipeline."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from numerics_suite.checks.inputs._padding_side import padding_moves
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.inputs.targets import is_row_of_numbers
from numerics_suite.subjects.tasks import CLASSIFICATION
from numerics_suite.subjects.tokenizers import TokenizerRaisesError, tokenizer_failures

TEXTS = (
    "The logits are finite.",
    "Gradients blow up when the loss scale is never lowered, and they go unnoticed until step two.",
    "数值稳定性",
    "x",
)

UNLIKELY_BITS = 20

COLLATED = "the collator"
"""The batch of :data:`TEXTS` as tokenizer and collator make it."""


@check(scope="precision", runs_on_nonfinite=True)
def pipeline(context: CellContext) -> Iterable[Measurement]:
    """Are the batches of tokenizer, collator and accelerate integral, in range and padded as the model needs?"""
    batches: dict[str, Mapping[str, Any]] = {}
    raised = None
    try:
        batches.update(_batches(context))
    except TokenizerRaisesError as error:
        raised = error
    yield _raised(raised)
    lacks = _lacks_pad_token(context) if raised is None else ""
    needs = bool(lacks) and context.request.rows > 1 and context.subject.task in CLASSIFICATION
    yield Measurement(name="no-pad-token", value=int(needs), unit="tokens", facts={"who": lacks} if needs else {})
    found = [*_measured(context, batches)]
    yield from found
    if raised is not None or needs or any(measurement.value for measurement in found):
        return
    if not batches:
        reason = "no tokenizer and no batch of its own"
        raise NotApplicableError(reason)
    if lacks and context.own_batch is None:
        reason = f"{lacks}: no rows of different lengths can be made, and nothing here needs them; texts alone are integral and in range"
        raise NotApplicableError(reason)


def _measured(context: CellContext, batches: Mapping[str, Mapping[str, Any]]) -> Iterable[Measurement]:
    floating, outside, rounded = [], [], []
    for origin, tensors in batches.items():
        for name in ("input_ids", "attention_mask", "labels", "position_ids", "token_type_ids"):
            value = tensors.get(name)
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not _real_labels(context, name):
                floating.append(f"{name} of {origin} is {str(value.dtype).removeprefix('torch.')}")
        ids = tensors.get("input_ids")
        if isinstance(ids, torch.Tensor) and not ids.is_floating_point() and context.takes_ids:
            if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= context.vocab_size):
                outside.append(f"{origin}: {int(ids.min())} to {int(ids.max())}, vocabulary {context.vocab_size}")
            rounded += [origin] if _looks_rounded(ids) else []
    yield _count("floating", floating, "tensors")
    yield _count("out-of-range", outside, "batches")
    yield _count("looks-rounded", rounded, "batches")
    # Rows whose ids are no tokens, or weights that are not finite, have no answer to compare.
    if (
        context.takes_ids
        and COLLATED in batches
        and not (outside or floating or context.broken or context.lacks_pad_token)
    ):
        moved = padding_moves(context, batches[COLLATED])
        yield from () if moved is None else (moved,)


def _count(name: str, found: list[str], unit: str) -> Measurement:
    return Measurement(name=name, value=len(found), unit=unit, facts={"where": "; ".join(found)} if found else {})


def _real_labels(context: CellContext, name: str) -> bool:
    """The labels of a regression, and of several classes at once, are floating by definition."""
    return name == "labels" and (not context.takes_ids or context.space.targets != "classes")


def _looks_rounded(ids: torch.Tensor) -> bool:
    """Whether the ids all equal their own bfloat16 rounding, and by chance would with a probability below 2**-20.

    bfloat16 holds 128 of the 2**k integers from 2**k on, so an id there is such a number with probability 2**-(k - 7).
    """
    large = torch.unique(ids[ids > 256])
    if large.numel() == 0 or not bool((large.to(torch.bfloat16).to(large.dtype) == large).all()):
        return False
    return sum(int(token).bit_length() - 1 - 7 for token in large.tolist()) >= UNLIKELY_BITS


def _raised(error: TokenizerRaisesError | None) -> Measurement:
    facts = {} if error is None else {"exception": str(error), "line": error.line, "input": error.doing}
    return Measurement(name="tokenizer-raises", value=int(error is not None), unit="exceptions", facts=facts)


def _lacks_pad_token(context: CellContext) -> str:
    """Whether tokenizer or config lacks a pad token, in words; empty if padding can be written and found again."""
    if context.lacks_pad_token:
        return "config.json has no pad_token_id, by which this classifier finds the last token of each row"
    tokenizer = context.tokenizer
    if tokenizer is None or tokenizer.pad_token is not None or config_pad_token(context) is not None:
        return ""
    return "neither the tokenizer nor config.json has a pad token"


def _batches(context: CellContext) -> Iterable[tuple[str, Mapping[str, Any]]]:
    if context.own_batch is not None:
        yield context.own_batch.drawn, context.own_batch.tensors
    tokenizer = context.tokenizer
    if tokenizer is None:
        return
    with tokenizer_failures(f"reading {TEXTS[0]!r}"):
        encoded = [tokenizer(text) for text in TEXTS]
    with tokenizer_failures(f"padding {len(TEXTS)} texts"):
        collated = _collate(context, tokenizer, encoded)
    yield COLLATED, collated
    if importlib.util.find_spec("accelerate") is not None:
        from accelerate.utils import convert_outputs_to_fp32, send_to_device

        yield "accelerate", send_to_device(collated, context.condition.main_device)
        yield "accelerate's fp32 conversion", convert_outputs_to_fp32(lambda: dict(collated))()


def _collate(context: CellContext, tokenizer: Any, encoded: list[Any]) -> dict[str, Any]:
    from transformers import DataCollatorWithPadding

    if tokenizer.pad_token is None and (known := config_pad_token(context)) is not None:
        tokenizer.pad_token = known
    if tokenizer.pad_token is None:
        longest = max(encoded, key=lambda item: len(item["input_ids"]))
        return {name: torch.tensor([value]) for name, value in longest.items()}
    rows = [dict(item) for item in encoded]
    if context.subject.task == "sequence-classification":
        number = max(context.num_labels, 1)
        several = is_row_of_numbers(context.space.targets, number)
        for index, row in enumerate(rows):
            row["label"] = [float(index % 2)] * number if several else index % number
    return dict(DataCollatorWithPadding(tokenizer, return_tensors="pt")(rows))


def config_pad_token(context: CellContext) -> str | None:
    """The tokenizer's token of the config's `pad_token_id`, None without one."""
    number = getattr(context.model.config, "pad_token_id", None)
    if not isinstance(number, int) or not 0 <= number < context.vocab_size:
        return None
    token = context.tokenizer.convert_ids_to_tokens(number)  # type: ignore[union-attr]
    return token if isinstance(token, str) else None
