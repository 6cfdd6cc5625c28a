"""forward.headroom."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from numerics_suite.core.records import Batch, Measurement, Series
from numerics_suite.core.registry import check
from numerics_suite.engine.blocks import decoder_blocks
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.runner import forward_pass
from numerics_suite.observations.headroom import Headroom
from numerics_suite.observations.headroom import headroom as headroom_by_module


@check(batches=True, seeks="largest-activation")
def headroom(context: CellContext, batch: Batch) -> Iterable[Measurement | Series]:
    """How many bits lie between the largest activation and the dtype's largest number?

    Hypothesis climbs the largest activation. Little headroom informs; only a value that is not finite fails.
    """
    tensors = context.inputs_of(batch)

    def call(model: nn.Module, given: Mapping[str, Any]) -> object:
        with forward_pass(context.condition):
            return call_model(model, given)

    found = headroom_by_module(context.model, tensors, call=call)
    if not found:
        yield Measurement(name="non-finite", value=0, unit="modules")
        return
    broken = [row for row in found if not row.bits > float("-inf")]
    least = min(found, key=lambda row: row.bits)
    yield Measurement(name="bits", value=least.bits, unit="bits", module=least.module, facts=_lowest(found))
    blocks = {*decoder_blocks(context.model), *context.family.lm_head_names, *context.family.head_names}
    for row in found:
        if row.module in blocks or row.module.rpartition(".")[2] in blocks:
            yield Measurement(name=f"bits {row.module}", value=row.bits, unit="bits", module=row.module)
    yield Measurement(name="largest-activation", value=least.largest, unit="", module=least.module)
    yield Measurement(
        name="non-finite",
        value=len(broken),
        unit="modules",
        module=broken[0].module if broken else None,
        facts={"first of": len(broken)} if broken else {},
    )
    yield Series(
        name="bits",
        unit="bits",
        along="module",
        at=tuple(row.module for row in found),
        values=tuple(row.bits for row in found),
        groups=tuple(_role(row.module, context) for row in found),
    )


def _role(module: str, context: CellContext) -> str:
    return context.family.role_of(type(context.model.get_submodule(module)).__name__)


def _lowest(found: list[Headroom]) -> dict[str, float | str]:
    """The five modules with the least headroom."""
    rows = sorted(found, key=lambda row: row.bits)[:5]
    return {row.module or "(model)": round(row.bits, 2) for row in rows}
