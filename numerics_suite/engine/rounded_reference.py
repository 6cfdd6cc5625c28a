"""The rounded run: what does the precision cost this program if every kernel is exact?

Each op is computed in float64 and rounded once to the dtype that the program gives it, which is learned from the op
itself at the first use of each combination of dtypes. Its distance from the true fp64 run is the inherent error.

An op is what PyTorch dispatches below autograd: a fused kernel (`_scaled_dot_product_flash_attention_for_cpu`, a
fused norm) is one op, rounded once. Views, copies, comparisons and integer ops are exact and run as they are; so do
random ops, to draw the same numbers. Rounding from float64 to a 16-bit float passes through float32, as PyTorch's
conversion does: once in 65,000 values that differs by a tiny part of a unit, far below what is measured.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from numerics_suite.devices.arithmetic import autocast as autocast_section
from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.engine import flash_registry, flex_rule, fused_ops, reference_ops
from numerics_suite.engine.calls import call_model, input_device, where_float64_is
from numerics_suite.engine.module_tree import modules_of, names_of
from numerics_suite.engine.outputs import floating_outputs, scalar_loss
from numerics_suite.engine.reference_ops import WIDER, Kind, plan_of, widen
from numerics_suite.engine.room import require_gradients
from numerics_suite.engine.true_fp64 import LiftToFp64, multiply_in_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_AS_IS: Final = frozenset({Kind.VIEW, Kind.EXACT, Kind.RANDOM, Kind.FOREIGN})
_COPY: Final = torch.ops.aten.copy_.default


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedRun:
    """One run with every op rounded once; the fields are those of `Fp64Run`.

    Attributes:
        outputs: Floating tensors of the model's output, exactly upcast to float64, by name.
        gradients: Parameter name → gradient of the loss, in the parameter's own dtype; None if not requested.
        left_out: "module: op" for what ran unchanged: a foreign kernel, or an op without a float64 one.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor] | None
    left_out: tuple[str, ...]


class RoundOnce(reference_ops.LeanMode):
    """The dispatch mode: every op in float64, rounded once."""

    _dtypes: Final[dict[Any, tuple[torch.dtype | None, ...]]] = {}
    """Op and dtypes of its arguments → dtypes of its results. Holds for every model, so it is shared."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` in float64 and round what it returns."""
        kwargs = kwargs or {}
        plan = plan_of(func)
        kind = plan.kind
        # A fused kernel is rounded once at its end, as a perfect kernel of its kind would; its inner sums count as exact.
        if (fused := fused_ops.formula_for(self, func, args, kwargs)) is not None:
            formula, given = fused
            return fused_ops.rounded(formula.compute(given), formula.dtypes(given))
        if kind is Kind.FOREIGN:
            self.leave_out(func)
        if kind in _AS_IS or func is _COPY:
            return func(*args, **kwargs)
        if kind is Kind.COMPOSITE:
            with self:
                return func.decompose(*args, **kwargs)
        # `a.add_(b)` rounds where it stores, into the dtype of `a`: one rounding as well.
        if plan.written:
            if reference_ops.writes_lower(plan, args, kwargs):
                return reference_ops.write_through(func, plan, args, kwargs)
            return func(*args, **kwargs)
        return self._compute(func, plan, args, kwargs)

    def _compute(self, func: Any, plan: reference_ops.OpPlan, args: Any, kwargs: dict[str, Any]) -> Any:
        key = (
            id(func),
            tuple(map(_signature, args)),
            tuple((name, _signature(value)) for name, value in kwargs.items()),
        )
        # The dtype of a result follows type promotion (0-dim tensors and Python scalars count less), which PyTorch alone knows.
        # So the op runs once as it is, and its answer's dtypes are kept for all later calls with the same dtypes.
        dtypes = self._dtypes.get(key)
        if dtypes is None:
            as_is = func(*args, **kwargs)
            dtypes = tuple(tensor.dtype for tensor in reference_ops.tensors_in(as_is))
            self._dtypes[key] = dtypes
            if not any(dtype in WIDER for dtype in dtypes):
                return as_is
        if not any(dtype in WIDER for dtype in dtypes):
            return func(*args, **kwargs)
        if plan.multiplies and (product := multiply_in_chunks(func, args, kwargs)) is not None:
            return _rounded(product, iter(dtypes))
        wide = [widen(argument) for argument in args]
        if 0 <= plan.narrow_flag < len(wide):
            wide[plan.narrow_flag] = False
        try:
            result = func(*wide, **{name: widen(argument) for name, argument in kwargs.items()})
        except (RuntimeError, NotImplementedError) as error:
            reraise_if_fatal(error)
            # No float64 kernel: its own rounding is in the result, so the inherent error would be too large. Named, not hidden.
            result = func(*args, **kwargs)
            self.leave_out(func)
        return _rounded(result, iter(dtypes))


def _signature(value: Any) -> Any:
    """Return the arguments' properties that the dtype of a result may depend on."""
    if isinstance(value, Tensor):
        # A tensor without dimensions promotes as a scalar does: 0-dim float32 times bfloat16 is bfloat16.
        return value.dtype, value.dim() == 0
    kind = type(value)
    if kind is bool or kind is torch.dtype:
        return value
    if kind in (list, tuple) and value and type(value[0]) is not int:
        return tuple(_signature(item) for item in value)
    return kind


def _rounded(result: Any, dtypes: Any) -> Any:
    if isinstance(result, Tensor):
        # The one rounding of the op. A result that takes no rounding (an index) has its own dtype already.
        return result.to(next(dtypes))
    if isinstance(result, list | tuple):
        return type(result)(_rounded(item, dtypes) for item in result)
    return result


def run_rounded(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    gradients: bool = False,
    autocast: torch.dtype | None = None,
    call: Callable[[nn.Module, Mapping[str, Any]], object] = call_model,
) -> RoundedRun:
    """Run `model` once with every op rounded once, in evaluation mode; the model is left as it was.

    Args:
        model: Any module, in the precision under test; a copy of it on the CPU where its device has no float64.
        batch: Tensors for the call.
        gradients: Whether to differentiate the loss. No loss scaling is applied.
        autocast: Lower dtype of an autocast section around the call.
        call: Calls the model. It may switch to `model.train()`.

    Raises:
        ValueError: Gradients are requested and the output has no scalar loss.
        NotApplicableError: The gradients of all parameters do not fit in memory.
    """
    model = where_float64_is(model)
    if gradients:
        require_gradients(model.parameters(), 0)
    names = names_of(model)
    with ExitStack() as stack:
        stack.enter_context(reference_ops.preserved(model))
        stack.enter_context(flash_registry.visible_attention(model))
        leaves = stack.enter_context(reference_ops.replaced_parameters(model, _leaf))
        for module in modules_of(model):
            module.training = False
        mode = stack.enter_context(RoundOnce(names))
        with torch.set_grad_enabled(gradients):
            with autocast_section(input_device(model), autocast):
                output = call(model, batch)
            if gradients:
                scalar_loss(output).backward()  # type: ignore[no-untyped-call]
        found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return RoundedRun(
            outputs={name: widen(tensor.detach()) for name, tensor in floating_outputs(output).items()},
            gradients=found if gradients else None,
            left_out=tuple(mode.left_out),
        )


def _leaf(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)


flex_rule.register(RoundOnce, lambda mode: LiftToFp64(mode.names), rounds=True)
