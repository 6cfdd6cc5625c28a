"""forward.pooling."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Batch, Fact, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.layout import INPUT, STATES, batch_first
from numerics_suite.engine.references import rounding_allowance, turned_states


@check(batches=True, needs=("head", "token-ids"))
def pooling(context: CellContext, batch: Batch) -> Iterable[Measurement]:
    """Does the classifier give a row of logits for each row of the batch, read at its last real token?

    The head is applied to every position of the last hidden state; the row of logits must be the nearest to the
    position of the last real token. The nearest position needs no tolerance.
    """
    shape = tuple(context.forward(batch)["logits"].shape)
    rows = len(batch.tensors["input_ids"])
    # A regression may give its one number for each row without a dimension of its own.
    wrong_shape = shape[:1] != (rows,) or len(shape) > 2
    facts: dict[str, Fact] = {"shape": str(list(shape)), "expected": f"[{rows}, {context.num_labels}]"}
    yield Measurement(name="wrong-shape", value=int(wrong_shape), unit="outputs", facts=facts if wrong_shape else {})
    if wrong_shape:
        return
    if context.family.pooling == "unknown":
        reason = "an encoder: it pools its first token or a mean, as each class has it"
        raise NotApplicableError(reason)
    head_name, head = _head(context)
    ids, mask = batch.tensors["input_ids"], batch.tensors["attention_mask"]
    if not batch.laws_apply:
        yield Measurement(name="wrong-rows", value=0, unit="rows", module=head_name)
        return
    logits, states = _logits_and_states(context, batch, head_name, head)
    positions = torch.arange(ids.shape[1])
    last = (mask * (positions + 1)).argmax(dim=1)
    # The same product in another shape may add its terms in another order: two roundings of what kernels accumulate in,
    # times the square root of the length of the sum where that is float32. With one token repeated all positions tie.
    noise = 2 * torch.finfo(logits.dtype).eps * rounding_allowance(context)
    wrong: list[str] = []
    for row in range(rows):
        distance = (states[row].double() - logits[row].double()).abs().amax(dim=-1)
        expected = float(distance[last[row]])
        # Two positions may tie (a repeated token at the start); a tie with the right one is right.
        if not expected <= float(distance.nan_to_num(nan=float("inf")).min()) + noise * float(logits[row].abs().max()):
            wrong.append(f"row {row} reads position {int(distance.argmin())}, not {int(last[row])}")
    yield Measurement(
        name="wrong-rows",
        value=len(wrong),
        unit="rows",
        module=head_name,
        facts={"rows": "; ".join(wrong[:4])} if wrong else {},
    )


def _head(context: CellContext) -> tuple[str, nn.Module]:
    for name, module in context.model.named_modules():
        if name.rpartition(".")[2] in context.family.head_names and isinstance(module, nn.Module):
            return name, module
    reason = f"no head named {' or '.join(context.family.head_names)}"
    raise NotApplicableError(reason)


@contextlib.contextmanager
def _given_to(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the head's inputs while it runs."""
    given: list[Tensor] = []

    def note(_: nn.Module, args: tuple[object, ...]) -> None:
        given.extend(value.detach() for value in args[:1] if isinstance(value, Tensor))

    handle = head.register_forward_pre_hook(note)
    try:
        yield given
    finally:
        handle.remove()


@contextlib.contextmanager
def _given_by(body: nn.Module | None) -> Iterator[list[Tensor]]:
    """Collects the body's first output: the states that the classifier pools."""
    gave: list[Tensor] = []

    def note(_module: nn.Module, _args: object, output: Any) -> None:
        first = output if isinstance(output, Tensor) else output[0]
        gave.extend([first.detach()] if isinstance(first, Tensor) else [])

    handle = None if body is None else body.register_forward_hook(note)
    try:
        yield gave
    finally:
        if handle is not None:
            handle.remove()


def _logits_and_states(context: CellContext, batch: Batch, name: str, head: nn.Module) -> tuple[Tensor, Tensor]:
    """The classifier's logits `[batch, labels]` and the head's answer for every position `[batch, sequence, labels]`."""
    tensors = context.inputs_of(batch)
    children = dict(context.model.named_children())
    body = next((part for part in context.family.backbone_names if part in children), "")
    with _given_to(head) as given, _given_by(children.get(body)) as gave:
        output = context.run(tensors, output_hidden_states=True)
    # What the head read is what it is asked about; one that reads a pooled row only is applied to what the body gave. The
    # last of `hidden_states` may come before the final norm (BioGPT up to 5.0, ChatGLM's own code).
    states, place = output.hidden_states[-1], STATES
    for found, where in ((given, f"{name}{INPUT}"), (gave, body)):
        if read := [each for each in found if each.dim() == 3]:
            states, place = read[-1], where
            break
    states = batch_first(states, place, turned_states(context))
    every = context.runner.submodule(head, states.to(next(head.parameters()).dtype))
    return output.logits.float().cpu(), every.float().cpu()
