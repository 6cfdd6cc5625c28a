"""forward.attention."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from numerics_suite.checks._laws import law_measurements, skipped_law
from numerics_suite.core.errors import NotApplicableError, UnsupportedError
from numerics_suite.core.records import Batch, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.references import (
    answer_under,
    caller,
    compare_law,
    plain_answer,
    rounded_answer,
    true_answer,
    without_labels,
)
from numerics_suite.observations.divergence import Side, first_parting
from numerics_suite.subjects.load import Loaded


@check(batches=True, share=0.4, needs=("token-ids",))
def attention(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Does this attention implementation agree with eager attention (and eager with sdpa)?"""
    if not batch.laws_apply:
        yield from skipped_law()
        return
    other, name = context.cached(_other)
    given, real = without_labels(batch.tensors), batch.tensors["attention_mask"].bool()
    answer = answer_under(context, other.model, name, given)

    def tokens(answer: Tensor) -> Tensor:
        return answer[real]

    found = compare_law(
        context,
        true=tokens(answer),
        true_other=tokens(true_answer(context, batch.tensors, own=True)),
        other=tokens(plain_answer(context, batch.tensors)),
        base=lambda: tokens(rounded_answer(context, batch.tensors)),
    )

    def place() -> str | None:
        call = caller(context, by_token=True)
        own, others = (
            Side(model=model, tensors=given, call=call, pick=tokens) for model in (context.model, other.model)
        )
        return first_parting(own, others)

    yield from law_measurements(*found, place=place)


def _other(context: CellContext) -> tuple[Loaded, str | None]:
    """The same weights under the other implementation; its name where they are bitwise equal."""
    name = "sdpa" if context.loaded.attn == "eager" else "eager"
    if context.subject.new_head:
        reason = "a new head is drawn at random, so two loads differ in it"
        raise NotApplicableError(reason)
    try:
        loaded = context.load(seed=context.request.seed, attn=name)
    except UnsupportedError as error:
        raise NotApplicableError(str(error)) from None
    same = _share_weights(loaded.model, context.model) and loaded.attn == name
    return loaded, name if same else None


def _share_weights(other: nn.Module, own: nn.Module) -> bool:
    """Let `other` share the weights of `own` that are bitwise equal, so that no second copy stays in memory.

    Returns:
        whether all parameters and buffers are.
    """
    held, same = dict(own.named_parameters()), True
    for name, parameter in other.named_parameters():
        twin = held.pop(name, None)
        if twin is not None and twin.dtype == parameter.dtype and torch.equal(twin, parameter):
            parameter.data = twin.data
        else:
            same = False
    buffers, others = dict(own.named_buffers()), dict(other.named_buffers())
    alike = buffers.keys() == others.keys() and all(torch.equal(others[name], value) for name, value in buffers.items())
    return same and alike and not held
