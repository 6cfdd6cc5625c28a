"""train.labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Batch, Fact, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine import own_batch
from numerics_suite.engine.calls import input_device, takes_decoder_ids
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.router_loss import adds_router_loss, without_router_loss
from numerics_suite.inputs.labels import IGNORED
from numerics_suite.inputs.targets import Targets
from numerics_suite.observations.comparison import differing_elements
from numerics_suite.observations.loss_dtype import log_softmax_dtype
from numerics_suite.observations.roundoff import unit_roundoff, wide


@check(batches=True, trains=True, needs=("token-ids",))
def labels(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Is the loss the one that the counted labels define, and is there no loss without labels?

    It is compared with the formula in float64 on the model's own logits. A drawn batch without a label that counts has
    NaN as its loss by torch's definition, and is no finding; the user's own is one. A mixture of experts' balancing
    loss is part of the loss by design; it is switched off here.
    """
    if "labels" not in batch.tensors:
        reason = "the batch has no labels"
        raise NotApplicableError(reason)
    if batch is context.usable_own_batch and context.takes_ids:
        yield from _counted(context, batch)
        if not own_batch.can_be_trained_on(context, batch):
            return
    with_labels = context.forward(batch, labels=True)
    plain, task = _without_labels(context, batch)
    without = context.forward(plain)
    yield Measurement(name="loss-without-labels", value=int("loss" in without), unit="losses")
    if "loss" not in with_labels:
        yield Measurement(name="loss-missing", value=1, unit="losses")
        return
    yield Measurement(
        name="logits-changed",
        value=differing_elements(wide(with_labels["logits"]), wide(without["logits"])),
        unit="elements",
        facts={"labels": "the logits differ between a call with labels and one without"},
    )
    got = _cross_entropy(context, batch, with_labels)
    wanted = defined_loss(without["logits"], batch.tensors["labels"], task, context.space.targets)
    if torch.isnan(wanted):
        yield Measurement(name="loss-error", value=0.0, unit="roundoffs", facts={"labels": "none counts"})
        return
    roundoff = max(unit_roundoff(got.dtype), context.cached(_log_softmax_roundoff))
    # Rounding moves a cross entropy by what it moves the largest logit and the loss by.
    size = float(wanted.abs()) + float(without["logits"].abs().max())
    error = abs(float(got) - float(wanted))
    yield Measurement(
        name="loss-error",
        value=error / (roundoff * size),
        unit="roundoffs",
        facts={"loss": float(got), "cross entropy over the labels that count": float(wanted)},
    )


def _counted(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """How many labels of the user's own batch count, and in how many batches of an epoch none does."""
    rows = own_batch.counted(context, batch)
    yield Measurement(name="counted-labels", value=sum(rows), unit="labels")
    length = int(batch.tensors["input_ids"].shape[1])
    facts: dict[str, Fact] = {"batch": batch.drawn, "tokens of a row": length}
    empty, without = int(own_batch.empty_batches_of(context, batch)), f"{rows.count(0)} of {len(rows)} rows have none"
    if own_batch.is_the_factorys(context, batch):
        facts["without a label that counts"] = f"the factory's own batch: {without}"
    else:
        facts["rows of a batch (--batch-size)"] = context.request.rows
        batches = -(-max(batch.rows_in_file, len(rows)) // context.request.rows)
        some = "any batch of an epoch" if not any(rows) else f"about {empty} of {batches} batches of an epoch"
        cut = (
            f"when cut to {context.space.max_length} tokens, the --seq-len of this run and not always of your training"
        )
        facts["without a label that counts"] = f"{some}: {without} {cut}"
    yield Measurement(name="no-counted-labels", value=empty, unit="batches", facts=facts)


def _without_labels(context: CellContext, batch: Batch) -> tuple[Batch, str]:
    """The batch to compute logits from, and the task that assigns labels to their rows.

    An encoder-decoder's decoder reads shifted labels, so its rows predict the labels unshifted.
    """
    if context.subject.task != "causal-lm" or not takes_decoder_ids(context.model):
        return batch, context.subject.task
    shift = getattr(context.model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None:
        reason = "an encoder-decoder that does not say what its decoder reads for labels"
        raise NotApplicableError(reason)
    moved = shift(labels=batch.tensors["labels"].to(input_device(context.model)))
    return replace(batch, tensors={**batch.tensors, "decoder_input_ids": moved}), "token-classification"


def _log_softmax_roundoff(context: CellContext) -> float:
    """The unit roundoff of the log-probabilities, which may be coarser than the loss; the same for every batch of a cell."""
    return unit_roundoff(log_softmax_dtype(lambda: context.run(context.training_batch.tensors)))


def _cross_entropy(context: CellContext, batch: Batch, with_labels: Mapping[str, Tensor]) -> Tensor:
    """The loss that the model returns, without the loss of its router."""
    if not adds_router_loss(context.model):
        return with_labels["loss"]
    with context.modified_model() as model, without_router_loss(model):
        return context.forward(batch, labels=True)["loss"]


def defined_loss(logits: Tensor, targets: Tensor, task: str, targets_are: Targets) -> Tensor:
    """The loss by definition, float64: mean negative log-likelihood of the labels that count.

    Of several classes at once it is the mean of -log sigmoid(logit) for those that hold and -log(1 - sigmoid(logit)) for
    the others; of a regression the mean squared error.

    Args:
        logits: `[batch, sequence, classes]`, or `[batch, classes]` for sequence classification.
        targets: int64 `[batch, sequence]` or `[batch]`, where -100 does not count; or numbers, `[batch]` or `[batch, labels]`.
        task: language modelling predicts the next token, so its labels are shifted by one.
        targets_are: what a sequence classifier's label is.
    """
    scores, wanted = logits.detach().cpu().double(), targets.cpu()
    if task == "sequence-classification" and targets_are != "classes":
        numbers = wanted.double().reshape(scores.shape)
        if targets_are == "many":
            return functional.binary_cross_entropy_with_logits(scores, numbers)
        return (scores - numbers).square().mean()
    if task == "causal-lm":
        scores, wanted = scores[:, :-1], wanted[:, 1:]
    scores, wanted = scores.reshape(-1, scores.shape[-1]), wanted.reshape(-1)
    counts = wanted != IGNORED
    if not bool(counts.any()):
        return torch.tensor(float("nan"), dtype=torch.float64)
    chosen = scores[counts].gather(1, wanted[counts].unsqueeze(1)).squeeze(1)
    return (torch.logsumexp(scores[counts], dim=1) - chosen).mean()
