"""load.head-init."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn

from numerics_suite.core.records import Fact, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.observations.roundoff import rms
from numerics_suite.subjects.files import tensor_headers


@check(scope="precision")
def head_init(context: CellContext) -> Iterable[Measurement]:
    """Is every weight that the checkpoint does not hold initialised, at a sane scale, and not by luck?

    The model is built under poison (uninitialised memory is NaN on any machine), so what is still NaN was never
    written.
    """
    unwritten = context.unwritten
    yield Measurement(
        name="uninitialised",
        value=len(unwritten),
        unit="parameters",
        module=unwritten[0].rpartition(".")[0] if unwritten else None,
        parameters=unwritten,
        facts=_stored(context, unwritten),
    )
    yield _gain(context.model, tuple(name for name in context.loaded.new_head if name not in unwritten))


def _stored(context: CellContext, names: tuple[str, ...]) -> dict[str, Fact]:
    """Whether the files hold trained values of these weights: never for a new head; otherwise the load lost them."""
    if not names or context.subject.path is None or context.subject.adapter_base:
        return {}
    stored = [f".{name}" for name in tensor_headers(context.subject.path)]
    # A class with another prefix than the file's has the same tensor under a name that ends alike.
    held = any(one.endswith(f".{name}") or f".{name}".endswith(one) for name in names for one in stored)
    return {"the checkpoint": "holds such a tensor" if held else "has no such tensor (it is a new head)"}


def _gain(model: nn.Module, names: tuple[str, ...]) -> Measurement:
    """The largest gain of a new weight: its root mean square times the square root of its fan-in."""
    worst, where = 0.0, None
    for name in names:
        weight = model.get_parameter(name).detach().float()
        if weight.dim() < 2:
            continue
        fan_in, _ = nn.init._calculate_fan_in_and_fan_out(weight)  # noqa: SLF001 - torch's own rule of fan-in
        gain = rms(weight) * math.sqrt(fan_in)
        if not gain <= worst:
            worst, where = gain, name
    return Measurement(
        name="gain",
        value=worst,
        unit="ratio",
        module=where.rpartition(".")[0] if where else None,
        parameters=(where,) if where else (),
    )
