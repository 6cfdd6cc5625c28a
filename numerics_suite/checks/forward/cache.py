"""forward.cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.checks._laws import law_measurements, skipped_law
from numerics_suite.core.records import Batch, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.evidence import Evidence
from numerics_suite.engine.references import caller, compare_law, rounded_answer, true_answer, trusted, without_labels
from numerics_suite.observing.parting import Side, first_parting


@check(batches=True, share=0.4, needs=("causal", "token-ids"))
def cache(evidence: Evidence, batch: Batch) -> Iterable[Measurement]:
    """Is decoding with the cache, token by token and in chunks, the full forward pass?

    The mask grows with the sequence, and no `position_ids` are given, as `generate` may be called.
    """
    width = int(batch.tensors["input_ids"].shape[1])
    if width < 2 or not batch.law_abiding:
        yield from skipped_law()
        return
    # A query that sees padding only has no answer by definition; those columns are left out.
    real = batch.tensors["attention_mask"].bool()
    # The last two tokens one by one; and the sequence in two chunks.
    for cuts in ([max(width - 2, 1), width - 1], [width // 2]):
        pieces = sorted({cut for cut in cuts if 0 < cut < width})
        decode = decoder(pieces)
        run = evidence.runner.true_fp64(without_labels(batch.tensors), call=decode)
        trusted(run.left_out)
        plain = evidence.runner.apply(lambda d=decode: d(evidence.model, without_labels(batch.tensors))["answer"])  # type: ignore[misc]
        found = compare_law(
            evidence,
            true=true_answer(evidence, batch.tensors)[real],
            true_other=run.outputs["answer"].cpu()[real],
            other=plain.cpu().double()[real],
            base=lambda: rounded_answer(evidence, batch.tensors)[real],
        )
        whole, cut = (
            Side(model=evidence.model, tensors=without_labels(batch.tensors), call=call, pick=lambda state: state[real])
            for call in (caller(evidence, by_token=True), decode)
        )
        yield from law_measurements(*found, place=lambda one=whole, other=cut: first_parting(one, other))  # type: ignore[misc]


def decoder(cuts: list[int]) -> Callable[[nn.Module, Mapping[str, Any]], dict[str, Tensor]]:
    """Calls the model on the sequence cut at these columns, handing its cache from piece to piece."""

    def call(model: nn.Module, tensors: Mapping[str, Any]) -> dict[str, Tensor]:
        ids, mask = tensors["input_ids"], tensors["attention_mask"]
        edges = [0, *cuts, ids.shape[1]]
        cached, logits = None, []
        for start, stop in itertools.pairwise(edges):
            piece = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            output = call_model(model, piece, use_cache=True, past_key_values=cached)
            cached = output.past_key_values
            logits.append(output.logits)
        return {"answer": torch.cat(logits, dim=1)}

    return call
