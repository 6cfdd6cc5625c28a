"""How large is each module's own error, given its real inputs?

Before a module runs in its precision it is run in true fp64 on the same inputs; the two outputs are compared when
it returns. Only the outputs of the modules that are open at the time are held, never all activations. Modules that
contain the list of blocks are not measured: their error is that of the whole model, not a local one.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from numerics_suite.devices.arithmetic import autocast as autocast_section
from numerics_suite.devices.arithmetic import casts_on
from numerics_suite.engine import flash_registry, flex_rule, fused_ops, reference_ops
from numerics_suite.engine.calls import call_model, input_device
from numerics_suite.engine.outputs import floating_outputs
from numerics_suite.engine.reference_ops import WIDER, Kind, plan_of
from numerics_suite.engine.submodule import run_module_in_fp64, run_module_rounded
from numerics_suite.observations.roundoff import largest_difference, rms, rms_error_in_roundoffs, unit_roundoff
from numerics_suite.observations.tokens import at_real

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalError:
    """The error that one module adds.

    Attributes:
        module: Its name, "" for the model itself.
        class_name: Its class.
        rms_roundoffs: Root mean square error in unit roundoffs of `dtype` times rms(true output); NaN and inf are kept.
        max_roundoffs: Largest error in the same unit.
        dtype: Coarsest float that the module computed in, such as "bfloat16": its output's, or under autocast that
            of the ops within. "float64" if there was no lower one.
        left_out: What of the true fp64 run could not be lifted; the error is not to be trusted unless this is empty.
        relative_roundoffs: Root mean square of each element's error in unit roundoffs of that element. A few large
            elements can dominate rms(output); this gives every element the same weight.
        kernel_ratio: The error over that of the module's rounded run, the smaller of the ratio of root mean squares and
            that of medians; for a module with submodules or a linear layer under autocast, NaN for another. How a
            softmax or a cancelling sum amplifies rounding depends on the weights; this ratio does not.
        count: Number of elements that the errors average over.
        fused_op: The fused op, or one that is not PyTorch's own, that ran in it; "" without one.
        fused_excess: The error of that op on its own against its formula, in units of one rounding; NaN without one.
    """

    module: str
    class_name: str
    rms_roundoffs: float
    max_roundoffs: float
    dtype: str
    left_out: tuple[str, ...] = ()
    relative_roundoffs: float = math.nan
    kernel_ratio: float = math.nan
    count: int = 0
    fused_op: str = ""
    fused_excess: float = math.nan


def local_errors(
    model: nn.Module,
    batch: Mapping[str, Tensor],
    *,
    autocast: torch.dtype | None = None,
    call: Callable[[nn.Module, Mapping[str, Any]], object] = call_model,
) -> list[LocalError]:
    """Measure every module's own error in one run of `model` in evaluation mode, without gradients.

    For a module with submodules its first floating output counts, else the worst of all outputs; of several runs the
    worst. Padding, as a 2-D "attention_mask" of the batch gives it, is left out: what a row that attends to nothing
    holds is up to the kernel. The model is left as it was.

    Args:
        model: Any module, in the precision under test.
        batch: Tensors for the call.
        autocast: Lower dtype of an autocast section around the call.
        call: Calls the model.

    Returns:
        In the order in which the modules first returned.
    """
    with ExitStack() as stack:
        stack.enter_context(reference_ops.preserved(model))
        for module in model.modules():
            module.training = False
        names = {id(module): name for name, module in model.named_modules()}
        observer = _Observer(names, _real_positions(batch))
        for module in _measured(model):
            stack.enter_context(
                _handle(module.register_forward_pre_hook(observer.before, prepend=True, with_kwargs=True))
            )
            stack.enter_context(_handle(module.register_forward_hook(observer.after)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(autocast_section(input_device(model), autocast))
        stack.enter_context(flash_registry.uncompiled_flex_attention(model))
        stack.enter_context(observer)
        call(model, batch)
    return list(observer.worst.values())


def first_over(errors: list[LocalError], budget: Callable[[LocalError], float]) -> LocalError | None:
    """Return the first module whose rms error is not within its budget (NaN never is), None if all are.

    Modules are in the order in which they returned, so a part comes before the whole that it spoils.
    """
    return next((error for error in errors if not error.rms_roundoffs <= budget(error)), None)


def _measured(model: nn.Module) -> Iterator[nn.Module]:
    above: set[str] = set()
    lists: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in lists):
            lists.append(name)
            parts = name.split(".")
            above |= {".".join(parts[:count]) for count in range(len(parts))}
    for name, module in model.named_modules():
        if name not in above and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield module


@contextmanager
def _handle(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@dataclass(slots=True)
class _Open:
    """A module that has started and not returned."""

    name: str
    class_name: str
    want: dict[str, Tensor]
    left_out: tuple[str, ...]
    rounded: dict[str, Tensor]
    coarsest: torch.dtype = torch.float64
    fused_op: str = ""
    fused_excess: float = math.nan

    def ran(self, fused_op: str, excess: float) -> None:
        """Keep the fused op that is furthest from its formula."""
        if fused_op and (not self.fused_op or excess > self.fused_excess or self.fused_excess != self.fused_excess):
            self.fused_op, self.fused_excess = fused_op, excess

    def saw(self, dtype: torch.dtype) -> None:
        if dtype.is_floating_point and unit_roundoff(dtype) > unit_roundoff(self.coarsest):
            self.coarsest = dtype


class _Observer(reference_ops.LeanMode):
    """Runs each module in fp64 before it runs in its precision; also records the dtypes of its ops."""

    def __init__(self, names: Mapping[int, str], real: Tensor | None) -> None:
        super().__init__(names)
        self.real = real
        self.open: list[_Open] = []
        self.worst: dict[str, LocalError] = {}
        self.busy = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.open and not self.busy:
            if func in fused_ops.FORMULAS:
                self.open[-1].ran(_name(func), fused_ops.excess_of(func, args, kwargs, result))
            elif plan_of(func).kind is Kind.FOREIGN:
                self.open[-1].ran(_name(func), math.nan)
            for tensor in reference_ops.tensors_in(result):
                if tensor.dtype in WIDER:
                    self.open[-1].saw(tensor.dtype)
        return result

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            # On the inputs that the module really gets, rounded as they are by what came before: the difference at its end is
            # what this module adds. Against a whole float64 run of the model each module would inherit the errors before it.
            output, left_out = run_module_in_fp64(module, args, kwargs, self.names)
            name, class_name = self.names[id(module)], type(module).__name__
            rounded = self._rounded(module, args, kwargs)
            self.open.append(_Open(name, class_name, _judged(module, output), left_out, rounded))
        finally:
            self.busy = False

    def _rounded(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """The module's output with every op rounded once; nothing for a module of a single op.

        A linear layer under autocast has three ops: both factors are rounded too, and a cancelling sum amplifies that.
        """
        cast = isinstance(module, nn.Linear) and casts_on(module.weight.device)
        if next(module.children(), None) is None and not cast:
            return {}
        return _judged(module, run_module_rounded(module, args, kwargs, self.names))

    def after(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:  # noqa: ARG002
        if self.busy:
            return
        self.busy = True
        try:
            with _disable_current_modes():
                self._close(self.open.pop(), _judged(module, output))
        finally:
            self.busy = False

    def _close(self, started: _Open, got: dict[str, Tensor]) -> None:
        for tensor in got.values():
            started.saw(tensor.dtype)
        # A container is as coarse as the coarsest of what runs in it, though its own output may be cast back to float32.
        if self.open:
            self.open[-1].saw(started.coarsest)
            self.open[-1].ran(started.fused_op, started.fused_excess)
        for name, want in started.want.items():
            self._keep(_error(started, got.get(name), want, started.rounded.get(name), self.real))

    def _keep(self, error: LocalError) -> None:
        before = self.worst.get(error.module)
        # `not <=` and not `>`: a NaN replaces every number. Nothing replaces a NaN, or a good last run would hide it.
        if before is None or not (math.isnan(before.rms_roundoffs) or error.rms_roundoffs <= before.rms_roundoffs):
            self.worst[error.module] = error


def _name(func: Any) -> str:
    return str(func).removesuffix(".default")


flex_rule.watched_by(_Observer, lambda observer: observer.open and observer.open[-1].ran("flex_attention", math.nan))


def _judged(module: nn.Module, output: object) -> dict[str, Tensor]:
    found = floating_outputs(output)
    return dict(list(found.items())[:1]) if any(True for _ in module.children()) else found


def _real_positions(batch: Mapping[str, Any]) -> Tensor | None:
    mask = batch.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all() else None


def _error(started: _Open, got: Tensor | None, want: Tensor, rounded: Tensor | None, real: Tensor | None) -> LocalError:
    relative = ratio = math.nan
    if got is None or got.shape != want.shape:
        typical = largest = math.inf
    else:
        # Where the device has no float64, what should be was computed on the CPU.
        got, want = at_real(real, got.to(want.device)), at_real(real, want)
        typical = rms_error_in_roundoffs(got, want, started.coarsest)
        relative = _relative_roundoffs(got, want, started.coarsest)
        # The unit is u · rms(y*), not u · |y*_i|: an element near zero by cancellation has no relative accuracy to lose.
        scale = rms(want) * unit_roundoff(started.coarsest)
        error = largest_difference(got, want)
        largest = 0.0 if error == 0.0 else error / scale if scale != 0.0 else math.inf
        if rounded is not None and typical:
            ratio = _kernel_ratio(got, want, at_real(real, rounded), started.coarsest)
    return LocalError(
        module=started.name,
        class_name=started.class_name,
        rms_roundoffs=typical,
        max_roundoffs=largest,
        dtype=str(started.coarsest).removeprefix("torch."),
        left_out=started.left_out,
        relative_roundoffs=relative,
        kernel_ratio=ratio,
        count=want.numel(),
        fused_op=started.fused_op,
        fused_excess=started.fused_excess,
    )


def _relative_roundoffs(got: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """Root mean square of the elements' own relative errors in unit roundoffs; subnormal elements are left out."""
    size = want.double().abs()
    # Below tiny a float's spacing stops shrinking, and what underflows to 0 errs by 100 %; above tiny / eps an inner value
    # that is eps times smaller is normal too.
    normal = size > torch.finfo(dtype).tiny / torch.finfo(dtype).eps if dtype != torch.float64 else size > 0
    error = (got.double() - want.double()).abs()
    if not bool(normal.any()):
        return 0.0 if not bool(error.any()) else math.inf
    return rms(error[normal] / size[normal]) / unit_roundoff(dtype)


def _kernel_ratio(got: Tensor, want: Tensor, rounded: Tensor, dtype: torch.dtype) -> float:
    """Error of the module over that of its rounded run, by root mean square or by median, whichever is smaller.

    The rounded run's error is taken as at least a single rounding's, 0.29 roundoffs: it may be exact by luck.
    """
    own, inherent = (got.double() - want.double()).abs(), (rounded.double() - want.double()).abs()
    # Rounding a number in [1, 2) errs uniformly on [-u, u]: root mean square u / sqrt(3), so between u / sqrt(3) relative to 1
    # and u / sqrt(12) relative to 2. 12 ** -0.5 = 0.29 is the lower end, so an exact rounded run cannot make the ratio infinite.
    one_rounding = 12**-0.5 * unit_roundoff(dtype)
    by_rms = rms(own) / max(rms(inherent), one_rounding * rms(want))
    typical = float(want.double().abs().median())
    by_median = float(own.median()) / max(float(inherent.median()), one_rounding * typical, 5e-324)
    # NaN must stay: a comparison with it is never within a budget.
    return by_rms if not by_median <= by_rms else by_median
