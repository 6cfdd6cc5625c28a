"""forward.cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from numerics_suite.checks._laws import law_measurements, skipped_law
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.exact import AGREED
from numerics_suite.core.records import Batch, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine import decoding
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.references import (
    agreeing,
    caller,
    compare_law,
    true_answer,
    true_pass,
    trusted,
    without_labels,
)
from numerics_suite.engine.router_loss import without_router_loss
from numerics_suite.inputs.batch_rows import telling_rows
from numerics_suite.observations.divergence import Side, first_parting
from numerics_suite.observations.roundoff import relative_error
from numerics_suite.subjects.generation import is_stateful

HOLE = 3
"""Columns of padding between a prompt and what is decoded after it, beyond those that the batch has."""

BEYOND = 3
"""Tokens decoded past a sliding window: one at its edge, one just past it, and a step of several."""

WINDOWS = ("sliding_window", "attention_window_size")
"""Config keys for the number of tokens that a token can look back."""

LARGEST_ROW = 4
"""A row past a sliding window is tried only if it has at most as many tokens as this many batches."""


@check(batches=True, share=0.4, needs=("causal", "token-ids"), adds=HOLE)
def cache(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Is decoding with the cache the full forward pass without one?

    Token by token as `generate` does, with the inputs that the class prepares; several tokens in one step and without
    `position_ids`, as a user's own loop may call it; after a prompt that was padded on the right; and past a
    sliding window. The mask grows with the sequence.
    """
    if not context.family.causal:
        reason = "an encoder: its tokens see both sides"
        raise NotApplicableError(reason)
    width = int(batch.tensors["input_ids"].shape[1])
    if width < 2 or not batch.laws_apply:
        yield from skipped_law()
        return
    # The router's loss takes a mask as long as the ids, which no step of decoding has.
    with without_router_loss(context.model):
        yield from _in_steps(context, batch, sorted({max(width - 2, 1), width - 1}), "generate")
        # A class with a recurrent state declares that it takes one token at a time.
        single = is_stateful(context.model)
        yield from _in_steps(context, batch, [width - 1 if single else width // 2], "none")
        yield from _after_right_padding(context, batch)
        yield from _past_window(context, batch)


def _in_steps(
    context: CellContext, batch: Batch, cuts: Sequence[int], positions: decoding.Positions
) -> Iterable[Measurement]:
    """Two rows decoded in pieces, beside the batch's full forward pass."""
    rows = telling_rows(batch)
    tensors = {name: value[rows] for name, value in without_labels(batch.tensors).items()}
    # A query that sees padding only has no answer by definition; those columns are left out.
    real = tensors["attention_mask"].bool()
    decode = decoding.with_cache(cuts, positions=positions)
    plain = context.runner.apply(lambda: decode(context.model, tensors)["answer"])
    stepped, whole = _true_steps(context, tensors, cuts, positions)[real], caller(context, by_token=True)
    true, base = agreeing(
        stepped,
        lambda answer: answer(context, batch.tensors)[rows][real],
        lambda answer: answer(context, tensors)[real],
    )
    if positions == "generate" and not relative_error(stepped, true) <= AGREED:
        # `generate` may count otherwise than the model itself (RoBERTa's own positions begin after its pad id): with and
        # without the cache are then compared under the positions of `generate`.
        counted = _true_whole(context, tensors)[real]
        if relative_error(stepped, counted) <= AGREED:
            true, whole, base = counted, decoding.without_cache, lambda: _rounded(context, tensors)[real]
    found = compare_law(context, true=true, true_other=stepped, other=plain.cpu().double()[real], base=base)
    one, other = (
        Side(model=context.model, tensors=tensors, call=call, pick=lambda state: state[real])
        for call in (whole, decode)
    )
    cause = _cause(context, tensors, cuts, found[0])
    if positions == "none" and cause == "wrong-positions" and _is_told_positions(context, tensors):
        return
    yield from law_measurements(*found, place=lambda: first_parting(one, other), cause=cause)


def _is_told_positions(context: CellContext, tensors: Mapping[str, Any]) -> bool:
    """Whether this code requires positions as an argument: its class passes them to every step of `generate`.

    Code from before transformers' `Cache`, such as ChatGLM's, keeps plain tuples and counts each step from 0 without them.
    """
    return bool(context.runner.apply(lambda: decoding.keeps_tuples(context.model, tensors)))


def _rounded(context: CellContext, tensors: Mapping[str, Any]) -> Tensor:
    run = context.runner.rounded(tensors, call=decoding.without_cache)
    trusted(run.left_out)
    return run.outputs["answer"].cpu()


def _true_whole(context: CellContext, tensors: Mapping[str, Any]) -> Tensor:
    """The true fp64 answer of one call without a cache."""
    return true_pass(context, tensors, decoding.without_cache, "without a cache")


def _true_steps(
    context: CellContext, tensors: Mapping[str, Any], cuts: Sequence[int], positions: decoding.Positions = "generate"
) -> Tensor:
    """The true fp64 answer of decoding in steps."""
    call = decoding.with_cache(cuts, positions=positions)
    return true_pass(context, tensors, call, f"steps at {list(cuts)}, positions of {positions}")


def _cause(context: CellContext, tensors: Mapping[str, Any], cuts: Sequence[int], exact: float) -> str | None:
    """`wrong-positions` where the law holds once `position_ids` are given; otherwise the law's own cause."""
    if exact <= AGREED or not decoding.takes_positions(context.model):
        return None
    real = tensors["attention_mask"].bool()
    told = _true_steps(context, tensors, cuts, "counted")[real]
    whole = _true_whole(context, tensors)[real]
    return "wrong-positions" if relative_error(told, whole) <= AGREED else None


def _after_right_padding(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """The last token of a row decoded after a prompt that was padded on the right, in true fp64.

    It is compared with the same layout in one call without a cache: a convolution or a window treats the padding in
    between alike on both sides.
    """
    tensors = _with_hole(batch, context.space.pad_id)
    if tensors is None or int(tensors["input_ids"].shape[1]) > context.longest:
        return
    real = tensors["attention_mask"].bool()
    cuts = [int(real.shape[1]) - 1]
    decode = decoding.with_cache(cuts)
    exact = relative_error(_true_steps(context, tensors, cuts)[real], _true_whole(context, tensors)[real])
    whole, cut = (
        Side(model=context.model, tensors=tensors, call=call, pick=lambda state: state[real])
        for call in (decoding.without_cache, decode)
    )
    module = None if exact <= AGREED else first_parting(whole, cut)
    cause = _cause(context, tensors, cuts, exact)
    yield Measurement(name="true", value=exact, unit="ratio", module=module, cause=cause)


def _with_hole(batch: Batch, pad: int) -> dict[str, Tensor] | None:
    """Two rows with the last token behind the padding; None for a batch that is padded on the left."""
    chosen = telling_rows(batch)
    ids, mask = batch.tensors["input_ids"][chosen], batch.tensors["attention_mask"][chosen]
    lengths = mask.sum(dim=1)
    if not bool(mask[:, 0].all()) or bool((lengths < 2).any()):
        return None
    rows = torch.arange(ids.shape[0])
    filler = torch.full((ids.shape[0], HOLE), pad, dtype=ids.dtype)
    prompt, seen = torch.cat([ids, filler], dim=1), torch.cat([mask, torch.zeros_like(filler, dtype=mask.dtype)], dim=1)
    prompt[rows, lengths - 1], seen[rows, lengths - 1] = pad, 0
    return {
        "input_ids": torch.cat([prompt, ids[rows, lengths - 1][:, None]], dim=1),
        "attention_mask": torch.cat([seen, torch.ones_like(seen[:, :1])], dim=1),
    }


def _past_window(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """The first row, repeated until it reaches past the sliding window, in true fp64; nothing if it already does."""
    window, width = window_of(context), int(batch.tensors["input_ids"].shape[1])
    most = LARGEST_ROW * context.request.rows * context.request.length
    if window is None or not width < window + BEYOND <= min(context.longest, most):
        return
    row = batch.tensors["input_ids"][0][batch.tensors["attention_mask"][0].bool()]
    ids = row.repeat(-(-(window + BEYOND) // len(row)))[None, : window + BEYOND]
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    steps = range(window - 1, window + BEYOND) if is_stateful(context.model) else (window - 1, window)
    cuts = list(steps)
    exact = relative_error(_true_steps(context, tensors, cuts), true_answer(context, tensors))
    yield Measurement(
        name="true",
        value=exact,
        unit="ratio",
        cause=_cause(context, tensors, cuts, exact),
        facts={"a row past the sliding window": f"{window + BEYOND} tokens, window {window}"},
    )


def window_of(context: CellContext) -> int | None:
    """Number of tokens that a token can look back in layers with a sliding window, None without such layers."""
    config = context.model.config
    for owner in (config, getattr(config, "text_config", None)):
        sizes = [getattr(owner, key, None) for key in WINDOWS]
        for size in sizes:
            if isinstance(size, int) and size > 1 and getattr(owner, "use_sliding_window", True) is not False:
                return size
    return None
