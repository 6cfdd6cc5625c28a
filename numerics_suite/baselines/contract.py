"""What does a caller rely on? Names that `forward` takes, what it returns, input dtypes, the default dtype, the new head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from numerics_suite.baselines.batches import tensors_of, training_of
from numerics_suite.baselines.curve import LARGE
from numerics_suite.baselines.records import StoredBatch
from numerics_suite.baselines.trace import real_rows
from numerics_suite.core.attributes import with_attribute
from numerics_suite.devices.condition import dtype_of
from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.module_tree import configs_of, modules_of
from numerics_suite.engine.outputs import floating_outputs, main_output
from numerics_suite.observations.roundoff import rms, unit_roundoff, wide
from numerics_suite.subjects.built_model import without_adapter
from numerics_suite.subjects.load import default_dtype

SAME_ROUNDOFFS: Final = 64
"""Two answers to one question differ by less in unit roundoffs, root mean square: a mask used wrongly gives another answer."""

MASK_DTYPES: Final = ("bool", "int32", "float32")


def contract(
    context: CellContext, batches: Sequence[StoredBatch], head: Mapping[str, Any], left_out: dict[str, str]
) -> dict[str, Any]:
    """As JSON: everything of the cell that a caller relies on and that is no number.

    Args:
        context: of the cell.
        batches: stored.
        head: statistics of a new head as the release draws it.
        left_out: gets what could not be found out, with the reason.
    """
    tensors = tensors_of(training_of(batches), context)
    outputs, cache = _outputs(context, tensors)
    found: dict[str, Any] = {
        "forward": _accepted(context, batches),
        "outputs": outputs,
        "cache": cache,
        "inputs": _inputs(context, tensors_of(_telling(batches), context)) if context.takes_ids else {},
        "head": {name: dict(facts) for name, facts in head.items()},
        "parameters": _dtypes(context.model),
    }
    if context.subject.path is not None:
        if sum(p.numel() for p in context.model.parameters()) > LARGE or context.subject.quantized:
            left_out["contract.default_dtype"] = (
                "it would be loaded a second time, which a large checkpoint has no room for"
            )
        else:
            found["default_dtype"] = default_dtype(context.subject)
    return found


def _dtypes(model: nn.Module) -> dict[str, int]:
    """How many parameters are held in each dtype."""
    counts: dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        counts[name] = counts.get(name, 0) + parameter.numel()
    return dict(sorted(counts.items()))


# --- outputs -------------------------------------------------------------------------------------------------------


def _outputs(context: CellContext, tensors: Mapping[str, Any]) -> tuple[dict[str, str], str | None]:
    """Field to dtype or class, and the class of the cache, None without one."""
    caches = context.takes_ids and _declares(type(context.model).forward, "use_cache")
    keywords: dict[str, Any] = {"use_cache": True} if caches else {}
    output = context.run(tensors, **keywords)
    fields = {name: str(value.dtype).removeprefix("torch.") for name, value in floating_outputs(output).items()}
    fields = {name: dtype for name, dtype in fields.items() if not name.partition(".")[0].endswith("past_key_values")}
    if not caches:
        return dict(sorted(fields.items())), None
    cache = getattr(output, "past_key_values", None)
    kind = None if cache is None else type(cache).__name__
    # Only its presence under this name matters; its numbers belong to the cache.
    names = [name for name, value in _items(output) if value is cache and value is not None]
    fields = {name: dtype for name, dtype in fields.items() if name.partition(".")[0] not in names}
    fields |= dict.fromkeys([*names, *([] if cache is None else ["past_key_values"])], "cache")
    return dict(sorted(fields.items())), kind


def _items(output: Any) -> list[tuple[str, Any]]:
    return list(output.items()) if isinstance(output, Mapping) else []


# --- arguments -----------------------------------------------------------------------------------------------------


def _accepted(context: CellContext, batches: Sequence[StoredBatch]) -> list[str]:
    """Names that `forward` takes, sorted: those of its signature, renamed ones, and those that have an effect."""
    model = context.model
    names = accepted_names(type(without_adapter(model)).forward)  # peft's wrapper takes anything
    if context.takes_ids:
        names |= _effective(context, tensors_of(batches[0], context), names)
    return sorted(names)


def accepted_names(forward: Callable[..., Any]) -> set[str]:
    """Names in a signature, and those that a wrapper of it renames to one of them.

    `**kwargs` takes any name, and what it swallows has no effect: that is no acceptance.
    """
    names = set(_named(inspect.unwrap(forward)))
    wrapper: Any = forward
    while wrapper is not None:
        closed = getattr(wrapper, "__closure__", None) or ()
        free = getattr(getattr(wrapper, "__code__", None), "co_freevars", ())
        held = {name: _content(cell) for name, cell in zip(free, closed, strict=False)}
        if isinstance(held.get("old_name"), str) and held.get("new_name") in names:
            names.add(held["old_name"])
        names |= set(_named(wrapper)) if "__signature__" not in vars(wrapper) else set()
        wrapper = getattr(wrapper, "__wrapped__", None)
    return names - {"self"}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None  # not filled yet


def _named(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    return [p.name for p in parameters if p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY}]


def _declares(forward: Callable[..., Any], name: str) -> bool:
    return name in accepted_names(forward)


def _effective(context: CellContext, tensors: Mapping[str, Any], known: set[str]) -> set[str]:
    """Names outside the signature that change what comes back: releases from 4.53 on move them into decorators."""
    given = context.inputs_in(tensors)
    found = set()
    tried: dict[str, tuple[Any, Callable[[Any], bool]]] = {
        "return_dict": (False, lambda output: isinstance(output, tuple)),
        "output_hidden_states": (True, lambda output: bool(getattr(output, "hidden_states", None))),
        "output_attentions": (True, lambda output: bool(getattr(output, "attentions", None))),
    }
    for name, (value, took) in tried.items():
        if name in known:
            continue
        with _eager(context.model):
            try:
                if took(context.run(given, **{name: value})):
                    found.add(name)
            except Exception as error:  # noqa: BLE001 - refused in whatever way
                reraise_if_fatal(error)
                continue
    return found


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Plain attention inside the context: other kernels return no weights."""
    key = "_attn_implementation_internal"
    with ExitStack() as stack:
        for config in configs_of(modules_of(model)):
            if getattr(config, key, None) is not None:
                stack.enter_context(with_attribute(config, key, "eager"))
        yield


# --- inputs --------------------------------------------------------------------------------------------------------


def _inputs(context: CellContext, tensors: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Argument to dtype to `same`, `other` (the answer) or `refused`; int64 is what the others are compared with."""
    given = context.inputs_in(tensors)
    want = _answer(context, given)
    tried = {"input_ids": ("int32", "float32"), "attention_mask": MASK_DTYPES}
    found: dict[str, dict[str, str]] = {}
    for name, dtypes in tried.items():
        if isinstance(given.get(name), Tensor):
            found[name] = {
                dtype: _verdict(context, {**given, name: given[name].to(dtype_of(dtype))}, want) for dtype in dtypes
            }
    return found


def _telling(batches: Sequence[StoredBatch]) -> StoredBatch:
    """Padded on the left where there is such a batch: a causal model's real tokens never see padding on the right."""
    return next((batch for batch in batches if batch.name == "left"), batches[0])


def _answer(context: CellContext, given: Mapping[str, Any]) -> Tensor:
    return real_rows(given, main_output(floating_outputs(context.run(given)))[1])


def _verdict(context: CellContext, given: Mapping[str, Any], want: Tensor) -> str:
    try:
        got = _answer(context, given)
    except Exception as error:  # noqa: BLE001 - refused in whatever way
        reraise_if_fatal(error)
        return "refused"
    if got.shape != want.shape:
        return "other"
    if torch.equal(got.isnan(), want.isnan()) and bool((got[~got.isnan()] == want[~want.isnan()]).all()):
        return "same"
    near = rms(wide(got) - wide(want)) <= SAME_ROUNDOFFS * unit_roundoff(dtype_of(context.recipe.computes_in)) * rms(
        want
    )
    return "same" if near else "other"
