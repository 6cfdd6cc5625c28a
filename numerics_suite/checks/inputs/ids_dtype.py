"""inputs.ids-dtype."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.outputs import floating_outputs, main_output
from numerics_suite.engine.reference_ops import preserved
from numerics_suite.observations.comparison import differing_elements

INTEGERS = (torch.int32, torch.int16, torch.uint8)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@check(needs=("token-ids",))
def ids_dtype(context: CellContext) -> Iterable[Measurement]:
    """Do integer ids of every width agree, are floating ids refused, and does every id keep its own meaning?"""
    base = _tensors(context)
    wanted = _output(context, base)
    disagreeing = 0
    used: list[str] = []
    for dtype in (*INTEGERS, *FLOATS):
        if not dtype.is_floating_point and int(base["input_ids"].max()) > torch.iinfo(dtype).max:
            continue
        try:
            # A call that is refused halfway may leave the model changed: up to 5.0 transformers records router logits by
            # replacing `forward` of the routers, and puts it back only where the call returns.
            with preserved(context.model):
                got = _output(context, {**base, "input_ids": base["input_ids"].to(dtype)})
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reraise_if_fatal(error)
            continue  # refused, which is right for floating ids and allowed for a narrow integer
        if dtype.is_floating_point:
            used.append(str(dtype).removeprefix("torch."))
        else:
            disagreeing += differing_elements(got, wanted)
    yield Measurement(name="integer-disagreement", value=disagreeing, unit="elements", module=_embedding(context))
    yield Measurement(
        name="floating-accepted",
        value=len(used),
        unit="dtypes",
        module=_embedding(context),
        facts={"silently used": ", ".join(used)} if used else {},
    )
    yield _merged(context)
    yield _edges(context)


def _tensors(context: CellContext) -> dict[str, torch.Tensor]:
    # Ids below 128 fit every width; they are spread over two rows of a full batch.
    length = min(8, context.space.max_length)
    limit = min(127, context.vocab_size)
    ids = torch.arange(1, length + 1) % limit
    rows = ids.unsqueeze(0)
    return {"input_ids": rows, "attention_mask": torch.ones_like(rows)}


def _output(context: CellContext, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return main_output(floating_outputs(context.run(tensors)))[1]


def _embedding(context: CellContext) -> str | None:
    entry = context.model.get_input_embeddings()  # type: ignore[operator]
    return next((name for name, module in context.model.named_modules() if module is entry), None)


def _merged(context: CellContext) -> Measurement:
    """Ids that a 16-bit float would round to another id, and that the model does not distinguish.

    bfloat16 keeps 8 bits of an integer and float16 11, so above 256 (2,048) some ids round to their neighbour. Where
    the embedding rows of both differ, so must the embedded states.
    """
    weight = context.model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    pairs: list[tuple[int, int]] = []
    for dtype in (torch.bfloat16, torch.float16):
        candidates = torch.arange(context.vocab_size)
        rounded = candidates.to(dtype).to(torch.int64)
        moved = candidates[(rounded != candidates) & (rounded < context.vocab_size)][:4]
        pairs += [(token, int(rounded[token])) for token in moved.tolist()]
    pairs = [pair for pair in pairs if not torch.equal(*weight[list(pair)])]
    merged = len(_same(context, pairs))
    return Measurement(
        name="merged-ids", value=merged, unit="pairs", module=_embedding(context), facts={"pairs tried": len(pairs)}
    )


def _edges(context: CellContext) -> Measurement:
    """The first and last id of the vocabulary with their neighbours, which an off-by-one range check would merge."""
    weight = context.model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    last = context.vocab_size - 1
    pairs = [pair for pair in ((0, 1), (last, last - 1)) if last > 0 and not torch.equal(*weight[list(pair)])]
    merged = [f"{left} and {right}" for left, right in _same(context, pairs)]
    return Measurement(
        name="merged-edges",
        value=len(merged),
        unit="pairs",
        module=_embedding(context),
        facts={"ids": "; ".join(merged)} if merged else {},
    )


def _same(context: CellContext, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs of ids that have equal states after the embedding; all ids in a few rows, each run alone."""
    tokens = sorted({token for pair in pairs for token in pair})
    states: dict[int, torch.Tensor] = {}
    room = max(1, context.space.max_length)
    for start in range(0, len(tokens), room):
        part = tokens[start : start + room]
        states |= zip(part, _embedded(context, part), strict=True)
    return [pair for pair in pairs if torch.equal(states[pair[0]], states[pair[1]])]


def _embedded(context: CellContext, tokens: Sequence[int]) -> torch.Tensor:
    """The states after the embedding for one row of these ids, `[tokens, …]`."""
    seen: list[torch.Tensor] = []
    entry = context.model.get_input_embeddings()  # type: ignore[operator]
    handle = entry.register_forward_hook(lambda _m, _a, output: seen.append(output.detach().clone()))
    ids = torch.tensor([tokens])
    try:
        context.run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    finally:
        handle.remove()
    return seen[0].reshape(len(tokens), -1) if seen else ids[0].double()
