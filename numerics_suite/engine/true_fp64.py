"""The true fp64 run: what would the model, as stored, compute without rounding?

A dispatch mode sees every op of the forward and backward passes below autograd. It turns each dtype argument that names
a lower float into float64 and upcasts each floating tensor argument, so the sections that a program hard-codes
in float32 (norms, rotary tables, softmax, a half-precision head) run in float64 too. `model.double()` does not
do that: the float64 minimum of its mask overflows in a float32 softmax.

Kept as the program stores them: the parameters, the buffers, and constants that Python makes in a lower float
(`torch.tensor(0.1, dtype=torch.float32)`), each with the value it has in its own dtype.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from numerics_suite.devices.arithmetic import torch_default_dtype
from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.engine import flex_rule, fused_ops, reference_ops, weight_stream
from numerics_suite.engine.calls import call_model, where_float64_is
from numerics_suite.engine.module_tree import modules_of, names_of
from numerics_suite.engine.outputs import floating_outputs, scalar_loss
from numerics_suite.engine.reference_ops import WIDER, Kind, plan_of, widen
from numerics_suite.engine.room import require_block, require_gradients

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

STREAM_ABOVE_BYTES: Final = 1 << 30
"""A model whose parameters in float64 take more bytes than this is streamed unless the caller decides."""

CHUNK_ELEMENTS: Final = 1 << 20
"""A weight with more elements is upcast in pieces of this size (8 MiB in float64, which caches hold) when it is multiplied."""

_ATEN: Final = torch.ops.aten


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp64Run:
    """One run wholly in float64.

    Attributes:
        outputs: Floating tensors of the model's output, float64, by name ("logits", "loss", "hidden_states.0").
        gradients: Parameter name → gradient of the loss, float64; a tied parameter once, one that the loss does not
            reach is absent; None without `gradients`.
        left_out: "module: op" for what could not be lifted. The run is a reference only where this is empty.
    """

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor] | None
    left_out: tuple[str, ...]


class LiftToFp64(reference_ops.LeanMode):
    """The dispatch mode: every op in float64.

    Args:
        names: Module id → name, to say where an op was that could not be lifted.
        protected: Addresses of storages that must not be written to.
        trained: Addresses of storages whose gradient would be lost if an op took them with gradients on.
    """

    def __init__(
        self, names: Mapping[int, str], protected: frozenset[int] = frozenset(), trained: frozenset[int] = frozenset()
    ) -> None:
        """Start with nothing left out."""
        super().__init__(names)
        self.protected = protected
        self.trained = trained

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` on lifted arguments."""
        kwargs = kwargs or {}
        plan = plan_of(func)
        kind = plan.kind
        if self.trained and torch.is_grad_enabled():
            self._find_lost_gradients(func, args)
        if (fused := fused_ops.formula_for(self, func, args, kwargs)) is not None:
            formula, given = fused
            return formula.compute(given)
        # A view must stay a view: on an upcast copy, a later in-place op would write to the copy and the program would not see it.
        # The one view that reads numbers otherwise is `view(dtype)`, which reinterprets bits; no float64 value has those bits.
        if kind is Kind.VIEW:
            if func is _ATEN.view.dtype and (args[0].is_floating_point() or args[1].is_floating_point):
                self.leave_out(func)
            return func(*args, **kwargs)
        # Taken apart under the mode itself, so that the parts come back here one by one.
        if kind is Kind.COMPOSITE:
            with self:
                return func.decompose(*args, **kwargs)
        if plan.written:
            if kind is Kind.RANDOM:
                return func(*args, **kwargs)
            if lower := reference_ops.writes_lower(plan, args, kwargs):
                return self._write_through(func, plan, args, kwargs, lower)
        return self._compute(func, plan, args, kwargs)

    def _compute(self, func: Any, plan: reference_ops.OpPlan, args: Any, kwargs: dict[str, Any]) -> Any:
        if kwargs:
            kwargs = {name: widen(argument) for name, argument in kwargs.items()}
        # Rows first, upcast then: an embedding of 150,000 rows would be upcast whole for the few that are read.
        # Picking rounds nothing, so both orders give the same numbers.
        if plan.gathers:
            return widen(func(*args, **kwargs))
        if plan.multiplies and (product := multiply_in_chunks(func, args, kwargs)) is not None:
            return product
        wide = [widen(argument) for argument in args]
        # `half_to_float=True` requests a float32 result of a float16 input; with a float64 input PyTorch refuses it.
        if 0 <= plan.narrow_flag < len(wide):
            wide[plan.narrow_flag] = False
        try:
            result = func(*wide, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            reraise_if_fatal(error)
            result = self._in_lower_float(func, wide, kwargs, error)
        # Still a lower float: the op has its dtype built in. The digits are lost, so the run is no reference any more.
        if isinstance(result, Tensor):
            if result.dtype in WIDER:
                self.leave_out(func)
                return widen(result)
        elif any(tensor.dtype in WIDER for tensor in reference_ops.tensors_in(result)):
            self.leave_out(func)
            return type(result)(widen(item) for item in result)
        if plan.kind is Kind.FOREIGN:
            self.leave_out(func)
        return result

    def _find_lost_gradients(self, func: Any, args: Any) -> None:
        """Note a parameter that is used outside the module that owns it: streaming does not see its gradient."""
        for tensor in reference_ops.tensors_in(args):
            if not tensor.requires_grad and tensor.untyped_storage().data_ptr() in self.trained:
                self.leave_out(f"gradient through {func} of a parameter used outside its module")

    def _write_through(
        self,
        func: Any,
        plan: reference_ops.OpPlan,
        args: Any,
        kwargs: dict[str, Any],
        lower: list[Tensor],
    ) -> Any:
        if any(tensor.untyped_storage().data_ptr() in self.protected for tensor in lower):
            message = f"{func} would change a parameter of the model; run it with stream=False"
            raise RuntimeError(message)
        self.leave_out(func)
        return reference_ops.write_through(func, plan, args, kwargs)

    def _in_lower_float(self, func: Any, args: list[Any], kwargs: dict[str, Any], error: Exception) -> Any:
        """Run an op without a float64 kernel in the widest float it has; raise `error` if it has none."""
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            try:
                result = func(
                    *(_narrow(item, dtype) for item in args), **{n: _narrow(v, dtype) for n, v in kwargs.items()}
                )
            except (RuntimeError, NotImplementedError) as refused:
                reraise_if_fatal(refused)
                continue
            self.leave_out(func)
            return type(result)(map(widen, result)) if isinstance(result, list | tuple) else widen(result)
        raise error


def _narrow(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.dtype is torch.float64 else value
    if value is torch.float64:
        return dtype
    return [_narrow(item, dtype) for item in value] if isinstance(value, list | tuple) else value


def multiply_in_chunks(func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """Multiply by a large weight of a lower float piece by piece; None where that is not the case.

    Each piece is upcast into the same memory: fresh pages for a whole head cost more than a product with a few tokens.
    """
    right: Tensor = args[-1]
    if right.dtype not in WIDER or right.numel() <= CHUNK_ELEMENTS or kwargs:
        return None
    left: Tensor = widen(args[-2])
    inner, outer = right.shape
    # [n, k] @ [k, m] is cut along the longer side of the weight. Along m each piece is a part of the result; along k
    # the pieces are summed, in float64, which differs from one product by roundoffs of 1e-16 only.
    along, shorter = int(outer >= inner), min(inner, outer)  # the longer side is cut
    step = max(1, CHUNK_ELEMENTS // shorter)
    scratch = torch.empty(step * shorter, dtype=WIDER[right.dtype], device=right.device)
    shape = (left.shape[0], outer)
    result = left.new_zeros(shape) if func is _ATEN.mm.default else widen(args[0]).expand(shape).clone()
    for start in range(0, right.shape[along], step):
        part = right.narrow(along, start, min(step, right.shape[along] - start))
        wide = _like(scratch, part).copy_(part)
        if along:
            result[:, start : start + step] += left @ wide
        else:
            result += left[:, start : start + step] @ wide
    return result


def _like(scratch: Tensor, part: Tensor) -> Tensor:
    """The first elements of `scratch` in the shape and order of `part`: a copy between two orders costs several times as much."""
    held = scratch[: part.numel()]
    return held.view(part.shape[::-1]).t() if part.stride(0) == 1 else held.view(part.shape)


class Fp64Session:
    """A model that computes in float64 until the context ends; yielded by `true_fp64`."""

    def __init__(
        self, mode: LiftToFp64, leaves: Mapping[str, nn.Parameter], sink: weight_stream.GradientSink | None
    ) -> None:
        """Built by `true_fp64`."""
        self._mode = mode
        self._leaves = leaves
        self._sink = sink

    @property
    def left_out(self) -> tuple[str, ...]:
        """What ran in the session without being lifted, as "module: op"."""
        return tuple(self._mode.left_out)

    def gradients(self) -> dict[str, Tensor]:
        """Return parameter name → gradient accumulated by the backward passes so far, float64."""
        if self._sink is not None:
            return dict(self._sink.gradients)
        return {name: leaf.grad for name, leaf in self._leaves.items() if leaf.grad is not None}


@contextmanager
def true_fp64(
    model: nn.Module, *, stream: bool = False, on_gradient: Callable[[str, Tensor], None] | None = None
) -> Iterator[Fp64Session]:
    """Make calls of `model` compute wholly in float64, forward and backward, from the parameters as stored.

    On exit the model is as it was: parameters, their `.grad`, buffers, hooks, attributes, training flags. Training
    flags are not changed on entry either.

    Args:
        model: Any module; the parameters may be of any float, also mixed.
        stream: Keep the parameters as stored and upcast each where it is used, so that memory is the model plus one
            piece. A backward pass then recomputes block by block. Without it the session holds a float64 copy.
        on_gradient: With `stream`, is given each parameter's name and whole gradient, which is then dropped.
            It must not keep a reference if memory matters.
    """
    names = names_of(model)
    with ExitStack() as stack:
        stack.enter_context(float64_surroundings(model))
        if stream:
            mode = LiftToFp64(names, _storages(model, trained_only=False), _storages(model, trained_only=True))
            sink = stack.enter_context(weight_stream.recomputed_blocks(model, on_gradient))
            stack.enter_context(mode)
            yield Fp64Session(mode, {}, sink)
        else:
            leaves = stack.enter_context(reference_ops.replaced_parameters(model, _wide_leaf))
            mode = stack.enter_context(LiftToFp64(names))
            yield Fp64Session(mode, leaves, None)


@contextmanager
def float64_surroundings(module: nn.Module) -> Iterator[None]:
    """Prepare `module` for a float64 run, apart from dispatch mode and parameters; restored on exit.

    It gets float64 buffers and default dtype, autocast off, and attention and experts that have float64 kernels.
    """
    with reference_ops.preserved(module), reference_ops.plain_kernels(module), _convolutions(module):
        _widen_buffers(module)
        # For `torch.zeros(3)` and the like inside a forward pass, which name no dtype that could be lifted.
        with torch_default_dtype(torch.float64):
            yield


class _WideConvolutions(TorchFunctionMode):
    """Upcasts the arguments of a convolution above the dispatch mode.

    PyTorch compares the dtypes of a convolution's input, weight and bias before it dispatches: parameters that stay as
    stored until an op takes them would be refused there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, a convolution on upcast arguments."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "").startswith("conv"):
            return func(*map(widen, args), **{name: widen(value) for name, value in kwargs.items()})
        return func(*args, **kwargs)


def _convolutions(module: nn.Module) -> AbstractContextManager[object]:
    convolves = any(isinstance(part, nn.modules.conv._ConvNd) for part in modules_of(module))  # noqa: SLF001 - the base of all
    return _WideConvolutions() if convolves else nullcontext()


def _storages(model: nn.Module, *, trained_only: bool) -> frozenset[int]:
    return frozenset(
        parameter.untyped_storage().data_ptr()
        for parameter in model.parameters()
        if parameter.requires_grad or not trained_only
    )


def _wide_leaf(parameter: nn.Parameter) -> nn.Parameter:
    # `copy=True`: a float64 parameter would share memory with its leaf otherwise, and an in-place op would change the model.
    wide = parameter.detach().to(WIDER.get(parameter.dtype, parameter.dtype), copy=True)
    return nn.Parameter(wide, requires_grad=parameter.requires_grad)


def _widen_buffers(model: nn.Module) -> None:
    # One wide copy for each buffer object: modules that share a buffer still share it.
    wide: dict[int, Tensor] = {}
    for module in modules_of(model):
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None and buffer.dtype in WIDER:
                module._buffers[name] = wide.setdefault(id(buffer), widen(buffer))  # noqa: SLF001


def run_true_fp64(  # noqa: PLR0913 - one run, one call
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    gradients: bool = False,
    stream: bool | None = None,
    call: Callable[[nn.Module, Mapping[str, Any]], object] = call_model,
    on_gradient: Callable[[str, Tensor], None] | None = None,
) -> Fp64Run:
    """Run `model` once in float64, as `true_fp64` does, in evaluation mode.

    Args:
        model: Any module; a copy of it on the CPU runs where its device has no float64.
        batch: Tensors for the call; floating ones are upcast.
        gradients: Whether to differentiate the loss (the output "loss", or a scalar output).
        stream: See `true_fp64`; None streams a model whose float64 copy is above `STREAM_ABOVE_BYTES`.
        call: Calls the model. It may switch to `model.train()`.
        on_gradient: See `true_fp64`; gradients given to it are not in the result.

    Raises:
        ValueError: Gradients are requested and the output has no scalar loss.
        NotApplicableError: The gradients of all parameters do not fit in memory, or a streamed block does not.
    """
    model = where_float64_is(model)
    if gradients and on_gradient is None:
        require_gradients(model.parameters(), 8)
    if stream is None:
        stream = sum(8 * parameter.numel() for parameter in model.parameters()) > STREAM_ABOVE_BYTES
    if gradients and stream:
        require_block(model, 2)  # and its gradients
    with true_fp64(model, stream=stream, on_gradient=on_gradient) as session:
        for module in modules_of(model):
            module.training = False
        with torch.set_grad_enabled(gradients):
            output = call(model, {name: widen(value) for name, value in batch.items()})
            if gradients:
                scalar_loss(output).backward()  # type: ignore[no-untyped-call]
        outputs = {name: widen(tensor.detach()) for name, tensor in floating_outputs(output).items()}
        return Fp64Run(outputs=outputs, gradients=session.gradients() if gradients else None, left_out=session.left_out)


flex_rule.register(LiftToFp64, lambda mode: mode, rounds=False)
