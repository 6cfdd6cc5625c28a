"""Are the token ids that the model is called with integers, were they never rounded to bfloat16, and has the model what ids and labels name?"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.devices.kinds import CPU
from numerics_suite.engine.calls import takes_token_ids
from numerics_suite.training_watch.alarms import Alarm
from numerics_suite.training_watch.norms import local
from numerics_suite.training_watch.ring import ForwardCall

ID_NAMES = ("input_ids", "position_ids", "token_type_ids")
"""Inputs that count or name something, so that no rounding is harmless."""

UNREPRESENTABLE = "ids that bfloat16 cannot hold"
"""Figure of the first batches."""

CHANCE_BITS = 40.0
"""Ids are called rounded where chance would make them all representable in bfloat16 in less than 1 of 2^40 batches.

An id in [2^k, 2^(k+1)) has 8 bits in bfloat16, so 1 of 2^(k-7) of them is representable: distinct ids above 256 add k - 7 bits each.
"""

ID_BATCHES = 8
"""Forward passes in which the ids' values are looked at: a pipeline that rounds does so from the first batch on. Their dtype is
looked at every time; it is known to the host."""


def token_ids(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The inputs of the call that are ids, by name; the first positional one of a language model is its `input_ids`."""
    for name in ID_NAMES:
        if isinstance(kwargs.get(name), Tensor):
            yield name, kwargs[name]
    if args and isinstance(args[0], Tensor) and takes_token_ids(model):
        yield "input_ids", args[0]


def refused(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], step: int, *, first: bool
) -> Alarm | None:
    """The alarm of a batch that the model cannot take: ids that are no integers, or what it has no row for; None of any other.

    Args:
        model: that is about to be called, without wrappers.
        args: of the call.
        kwargs: of the call.
        step: of the optimizer.
        first: nothing has been found yet; what the model has no row for is reported once.
    """
    for name, ids in token_ids(model, args, kwargs):
        if ids.is_floating_point():
            text = f"{name} came as {str(ids.dtype).removeprefix('torch.')}; token ids must be integers"
            return Alarm(step=step, kind="inputs", bad=True, text=text, cause="wrong-input-dtype")
    outside = out_of_range(model, args, kwargs) if first else None
    if outside is None:
        return None
    return Alarm(step=step, kind="inputs", bad=True, text=outside, cause="out-of-range-input")


def out_of_range(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """What the batch names that the model has not: an id without a row of the embedding, a label without a class; None without any.

    Of tensors on the host alone: to look at another device's would wait for it. There an op that finds no row ends the whole process.
    """
    ids = next((ids for name, ids in token_ids(model, args, kwargs) if name == "input_ids"), None)
    labels = kwargs.get("labels")
    # A model of pictures or sounds puts its own vectors where placeholders are, which may name no row.
    config = getattr(model, "config", None)
    seen = any(getattr(config, name, None) is not None for name in ("vision_config", "audio_config"))
    table = None if seen else _called(model, "get_input_embeddings")
    if type(table) is nn.Embedding and (worst := _above(ids, table.num_embeddings)) is not None:
        return f"input_ids hold {worst}, and the embedding has {table.num_embeddings} rows (0 to {table.num_embeddings - 1})"
    classes = _classes(model)
    if classes is not None and (worst := _above(labels, classes)) is not None:
        return f"labels hold {worst}, and the model has {classes} classes (0 to {classes - 1})"
    return None


def _called(model: nn.Module, name: str) -> Any:
    """What a method of a language model returns; None where the model has none, or the method is not written."""
    with contextlib.suppress(NotImplementedError, AttributeError):
        return getattr(model, name)()
    return None


def _classes(model: nn.Module) -> int | None:
    """How many classes the labels are of: the rows of the output embedding, or those of a head whose labels are one class each."""
    output, config = _called(model, "get_output_embeddings"), getattr(model, "config", None)
    if type(output) is nn.Linear:
        return output.out_features
    count = getattr(config, "num_labels", None)
    one_each = getattr(config, "problem_type", None) in {None, "single_label_classification"}
    named = type(model).__name__.endswith(("ForSequenceClassification", "ForTokenClassification"))
    return count if named and one_each and isinstance(count, int) and count > 1 else None


@torch.no_grad()
def _above(value: object, rows: int) -> int | None:
    """The largest number of a tensor of integers on the host, where it names no row."""
    if not isinstance(value, Tensor) or value.device.type != CPU or value.is_floating_point() or not value.numel():
        return None
    if value.dtype == torch.bool or type(value) is not Tensor:
        return None
    largest = int(value.max())
    return largest if largest >= rows else None


@torch.no_grad()
def unrepresentable(ids: Tensor) -> Tensor | None:
    """How many ids bfloat16 cannot hold, as a tensor of one element; None of no ids."""
    ids = local(ids.detach())
    if not ids.numel() or ids.dtype == torch.bool:
        return None
    return (ids.float().bfloat16().float() != ids.float()).sum()


def unrepresentable_ids(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """The figure of a call's `input_ids`, to be read once the device has it; none where the call has none."""
    counts = [
        unrepresentable(ids)
        for name, ids in token_ids(model, args, kwargs)
        if name == "input_ids" and not ids.is_floating_point()
    ]
    return [(UNREPRESENTABLE, count) for count in counts if count is not None]


def rounding_bits(ids: Tensor) -> float:
    """How unlikely it is, in bits, that all these ids are representable in bfloat16 by chance; 0 where one is not."""
    left = unrepresentable(ids)
    if left is None or int(left):
        return 0.0
    distinct = torch.unique(local(ids.detach()).cpu().double()).tolist()
    return math.fsum(math.floor(math.log2(value)) - 7 for value in distinct if value >= 256)


def rounded_ids(model: nn.Module, calls: Sequence[ForwardCall]) -> Alarm | None:
    """The early warning of ids that equal their own rounding too well for chance; None where chance explains it."""
    given = [ids for call in calls for name, ids in token_ids(model, call.args, call.kwargs) if name == "input_ids"]
    bits = max(map(rounding_bits, given), default=0.0)
    if bits < CHANCE_BITS:
        return None
    text = f"every id of input_ids equals its own rounding to bfloat16, by chance in 1 of 2^{bits:.0f} batches: they were cast on the way"
    facts = {"bits of chance": bits}
    step = calls[0].step
    return Alarm(step=step, kind="rounded-ids", bad=False, text=text, cause="wrong-input-dtype", facts=facts)


def named_inputs(model: nn.Module, call: ForwardCall) -> dict[str, Any]:
    """What a call hands to the model, by name; the first positional input of a language model is its `input_ids`."""
    count = len(call.args)
    kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    own = [name for name, each in inspect.signature(model.forward).parameters.items() if each.kind in kinds]
    names = own[:count] + [f"arg{index}" for index in range(len(own), count)]
    if count and takes_token_ids(model):
        names[0] = "input_ids"
    return {**dict(zip(names, call.args, strict=True)), **call.kwargs}
