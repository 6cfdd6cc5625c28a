"""reference.local."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.numbers import nan_last
from numerics_suite.core.records import Measurement, Series
from numerics_suite.core.registry import check
from numerics_suite.devices.condition import dtype_of
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.references import is_reference_itself, longest_reduction, refuse_without_ids
from numerics_suite.observations.local_error import LocalError, local_errors
from numerics_suite.observations.roundoff import unit_roundoff

COMPOSED = "composed"
"""The measurement of modules that are judged by their kernel ratio, not by roundoffs."""


@check()
def local(context: CellContext) -> Iterable[Measurement | Series]:
    """Is every module's own error, on its real inputs, no larger than a correct program's?

    Root mean square error against its own true fp64 output, in unit roundoffs of the dtype it computes in; by role.
    """
    if is_reference_itself(context):
        reason = "fp64 is the reference itself"
        raise NotApplicableError(reason)
    refuse_without_ids(context)
    tensors = context.inputs_of(context.gradient_batch)
    with context.condition.arithmetic():
        found = local_errors(context.model, tensors, autocast=context.condition.autocast)
    judged = [error for error in found if not error.left_out and error.dtype != "float64"]
    if not judged:
        reason = "no module could be lifted to float64"
        raise NotApplicableError(reason)
    yield _coarser(judged, context)
    longest = longest_reduction(context.model)
    rows = [(error, *_value(error, context, longest)) for error in judged]
    for name in dict.fromkeys(name for _, name, _ in rows):
        worst, _, value = max((row for row in rows if row[1] == name), key=lambda row: nan_last(row[2]))
        yield Measurement(
            name=name,
            value=value,
            unit="roundoffs" if worst.kernel_ratio != worst.kernel_ratio else "ratio",
            module=worst.module,
            op=_op_at_fault(worst),
            cause="kernel-accuracy" if _op_at_fault(worst) else None,
            facts={
                "class": worst.class_name,
                "computes in": worst.dtype,
                "error in roundoffs (rms)": worst.rms_roundoffs,
                "largest error in roundoffs": worst.max_roundoffs,
                **_fused(worst),
            },
        )
    yield from _by_module(rows, context, longest)


def _fused(error: LocalError) -> dict[str, str | float]:
    """The fused op that ran in the module, and its own error."""
    if not error.fused_op:
        return {}
    own = {} if error.fused_excess != error.fused_excess else {"error of the fused op in roundings": error.fused_excess}
    return {"fused op": error.fused_op, **own}


def _op_at_fault(error: LocalError) -> str | None:
    """The fused op, if its own error explains the module's: at least half as large, each in its own measure."""
    return error.fused_op if error.fused_excess >= error.kernel_ratio / 2 else None


def _by_module(rows: list[tuple[LocalError, str, float]], context: CellContext, longest: int) -> Iterable[Series]:
    """Every module's error, then the kernel ratios of modules judged by these: roundoffs and ratios share no axis."""
    roles = {error.module: context.family.role_of(error.class_name) for error, _, _ in rows}
    errors = [
        (error.module, error.rms_roundoffs / _allowance(error, longest), "")
        if name == COMPOSED
        else (error.module, value, name)
        for error, name, value in rows
    ]
    ratios = [(error.module, value, name) for error, name, value in rows if name == COMPOSED]
    for name, unit, points in (("error", "roundoffs", errors), (COMPOSED, "ratio", ratios)):
        if points:
            at, values, budgets = zip(*points, strict=True)
            groups = tuple(roles[module] for module in at)
            yield Series(name=name, unit=unit, along="module", at=at, values=values, groups=groups, budgets=budgets)


def _allowance(error: LocalError, longest: int) -> float:
    """Divisor of an error: kernels accumulate in float32, so in float32 a long sum may have a larger error."""
    return longest**0.5 if error.dtype == "float32" else 1.0


def _coarser(errors: list[LocalError], context: CellContext) -> Measurement:
    """Modules with an op in a coarser float than the recipe computes in, the innermost first.

    Their error in roundoffs of that coarser float looks normal, so such ops are counted instead.
    """
    asked = unit_roundoff(dtype_of(context.recipe.computes_in))
    coarser = [error for error in errors if unit_roundoff(dtype_of(error.dtype)) > asked]
    return Measurement(
        name="coarser",
        value=len(coarser),
        unit="modules",
        module=coarser[0].module if coarser else None,
        facts={"computes in": coarser[0].dtype, "asked for": context.recipe.computes_in} if coarser else {},
    )


def _value(error: LocalError, context: CellContext, longest: int) -> tuple[str, float]:
    """Name of the measurement and its value.

    A module of one op by its roundoffs, rms or element by element, whichever is smaller; one of several by its kernel
    ratio. In float32 both in units of the square root of the longest sum, since kernels accumulate in float32.
    """
    role = context.family.role_of(error.class_name)
    composed = error.kernel_ratio == error.kernel_ratio or role in {"attention", "block", "mlp"}
    allowance = _allowance(error, longest)
    if composed:
        ratio = error.kernel_ratio if error.rms_roundoffs else 0.0
        return COMPOSED, ratio / allowance
    smaller = error.rms_roundoffs if not error.relative_roundoffs <= error.rms_roundoffs else error.relative_roundoffs
    return role, smaller / allowance
