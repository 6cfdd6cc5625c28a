"""The batch that comes with a subject: a factory's, or the user's `--data`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Batch
from numerics_suite.inputs.labels import counted_labels, empty_batches, no_label_counts
from numerics_suite.subjects.tokenizers import TokenizerRaisesError

if TYPE_CHECKING:
    from numerics_suite.engine.cell_context import CellContext


def own_batch(context: CellContext) -> Batch | None:
    """The batch unchanged; None without one, or if the tokenizer fails, which `inputs.pipeline` reports."""
    if context.loaded.batch is not None:
        return Batch(tensors=dict(context.loaded.batch), drawn="the factory's own batch")
    data = context.request.data
    if data is None or not context.takes_ids:
        return None
    try:
        return None if context.tokenizer is None else data(context.subject, context.space, context.tokenizer)
    except (TokenizerRaisesError, NotApplicableError):
        return None


def usable(context: CellContext, batch: Batch | None) -> Batch | None:
    """The batch if the model accepts it; otherwise None, and `inputs.pipeline` reports what is wrong."""
    if batch is None or not context.takes_ids:
        return batch
    ids = batch.tensors.get("input_ids")
    if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel():
        return None
    if int(ids.min()) < 0 or int(ids.max()) >= context.vocab_size:
        return None
    # Without a mask every token is real, as for the model itself.
    tensors = {"attention_mask": torch.ones_like(ids), **batch.tensors}
    # Laws rebuild a batch from ids and mask: positions or segments of the user's own would be lost on the way.
    plain = tensors.keys() <= {"input_ids", "attention_mask", "labels"}
    pad_inside = bool(((ids == context.space.pad_id) & (tensors["attention_mask"] != 0)).any())
    # Dynamic RoPE depends on the longest row of the batch, and remembers it: rows are not independent.
    one_table = int(ids.shape[-1]) <= context.longest
    return replace(batch, tensors=tensors, laws_apply=plain and one_table and not pad_inside)


def counted(context: CellContext, batch: Batch) -> tuple[int, ...]:
    """How many labels of each row count, for the rows of the user's file if they were counted, else for the batch."""
    labels = counted_labels(batch.tensors["labels"], shifted=context.subject.task == "causal-lm")
    return batch.label_counts or tuple(labels.tolist())


def is_the_factorys(context: CellContext, batch: Batch) -> bool:
    """Whether the batch comes from a factory and is trained on unchanged: its rows are neither cut nor sampled."""
    return context.loaded.batch is not None and batch is context.usable_own_batch


def empty_batches_of(context: CellContext, batch: Batch) -> float:
    """How many batches of an epoch over the user's rows are expected to have no label that counts, at least 1 where no row has one."""
    if is_the_factorys(context, batch):
        return float(not can_be_trained_on(context, batch))
    found = empty_batches(counted(context, batch), batch=context.request.rows, rows=batch.rows_in_file)
    return found if can_be_trained_on(context, batch) else max(1.0, found)


def can_be_trained_on(context: CellContext, batch: Batch | None) -> bool:
    """Whether a training step over the batch has a loss; the mean over no label is NaN by definition."""
    if batch is None or not context.takes_ids:
        return batch is not None
    has_labels = isinstance(batch.tensors.get("labels"), Tensor)
    return has_labels and not no_label_counts(batch.tensors, shifted=context.subject.task == "causal-lm")
