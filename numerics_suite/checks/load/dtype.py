"""load.dtype."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from numerics_suite.checks.load._buffers import rounded_buffers
from numerics_suite.checks.load._dtypes import named_by_class, only_with_config
from numerics_suite.core.records import Fact, Measurement
from numerics_suite.core.registry import check
from numerics_suite.devices.condition import dtype_of
from numerics_suite.engine.cell_context import CellContext

SHOWN = 5
"""Most names that a fact lists."""


@check(scope="precision")
def dtype(context: CellContext) -> Iterable[Measurement]:
    """Is the model in the requested dtype, apart from what it declares to keep in float32, and is no buffer rounded?"""
    loaded = context.loaded
    asked = dtype_of(context.recipe.parameters)
    kept = _declared_fp32(loaded.model)
    other: dict[str, str] = {}
    declared: list[str] = []
    obeys = False
    for name, parameter in loaded.model.named_parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.dtype == asked:
            # A new head is made in the requested dtype, whatever happened to the weights.
            obeys = obeys or name not in loaded.new_head
        elif str(parameter.dtype) == "torch.float32" and any(part in name for part in kept):
            declared.append(name)
        elif not context.subject.quantized:
            other[name] = str(parameter.dtype).removeprefix("torch.")
    facts: dict[str, Fact] = {"asked": context.recipe.parameters}
    if other:
        facts["held"] = ", ".join(f"{name}: {held}" for name, held in list(other.items())[:SHOWN])
    if declared:
        facts["kept in fp32 as the model declares"] = ", ".join(declared[:SHOWN])
    # A wider dtype than requested loses nothing; it costs memory, and outputs differ from those in the requested dtype.
    wider = bool(other) and all(_is_wider(held, asked) for held in other.values())
    if other:
        facts |= named_by_class(context, other) if obeys else _of_the_load(context)
    yield _of_parameters("ignored-dtype", {} if obeys else other, facts)
    yield _of_parameters("other-dtype", other if obeys else {}, facts, cause="contract-change" if wider else None)
    rounded = rounded_buffers(context)
    yield Measurement(
        name="rounded-buffers",
        value=len(rounded),
        unit="buffers",
        module=next(iter(rounded)).rpartition(".")[0] if rounded else None,
        parameters=tuple(rounded),
        facts=dict(list(rounded.items())[:SHOWN]),
    )


def _of_parameters(
    name: str, other: Mapping[str, str], facts: Mapping[str, Fact], *, cause: str | None = None
) -> Measurement:
    holds = ", ".join(sorted(set(other.values())))
    if "ignored by" in facts:
        holds += " where from_pretrained is handed a config"
    return Measurement(
        name=name,
        value=len(other),
        unit="parameters",
        module=next(iter(other)).rpartition(".")[0] if other else None,
        parameters=tuple(other),
        cause=cause if other else None,
        facts={**facts, "holds": holds} if other else facts,
    )


def _of_the_load(context: CellContext) -> dict[str, Fact]:
    """The kind of load that ignores the dtype, if another kind respects it."""
    if not only_with_config(context):
        return {}
    return {
        "ignored by": "from_pretrained with config=; by the folder alone, or with the dtype given to AutoConfig.from_pretrained "
        f"too, the model is in {context.recipe.parameters}"
    }


def _declared_fp32(model: object) -> tuple[str, ...]:
    names = [*(getattr(model, "_keep_in_fp32_modules", None) or [])]
    names += [*(getattr(model, "_keep_in_fp32_modules_strict", None) or [])]
    return tuple(names)


def _is_wider(held: str, asked: torch.dtype) -> bool:
    """Whether the dtype represents every number of the requested one."""
    one, other = torch.finfo(dtype_of(held)), torch.finfo(asked)
    return one.eps <= other.eps and one.max >= other.max
