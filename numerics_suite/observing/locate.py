"""Where a value stops being finite: the first op with finite inputs and a non-finite output.

Works on the forward pass and on the backward pass, whose ops run under the same dispatch mode; an op of the backward
pass has no module of its own on the stack, so it is given the module whose forward pass recorded its autograd node.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from numerics_suite.observing.finiteness import nonfinite_count

OWN = Path(__file__).resolve().parent.parent
QUIET = {"aten.detach.default", "aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"}
"""Ops that compute nothing: what they return was made elsewhere or is still to be written."""

PRODUCTS = {"aten.mm.default", "aten.bmm.default", "aten.addmm.default", "aten.baddbmm.default"}
"""Matrix products, whose -inf is an overflow and no mask."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The op where a value stopped being finite.

    Attributes:
        op: such as `aten.softmax.int`.
        module: dotted name, None in the backward pass or outside every module.
        source: `file.py:123` of the model's own line, None where unknown.
        dtype: of the output.
        largest_input: largest magnitude of the finite inputs.
        nonfinite: non-finite elements of the output.
        elements: elements of the output.
        has_infinity: infinities among them, as an overflow leaves.
        outside_domain: it divided by zero, or took a root or logarithm of what has none.
        masked_row: the input holds a row without any finite value, as a fully masked row is.
        backward: it happened in the backward pass.
        parameters: parameters among its inputs that are themselves not finite (then they are the origin).
    """

    op: str
    module: str | None
    source: str | None
    dtype: str
    largest_input: float
    nonfinite: int
    elements: int
    has_infinity: bool
    outside_domain: bool
    masked_row: bool
    backward: bool
    parameters: tuple[str, ...] = ()


@dataclass(slots=True)
class _Stack:
    """Names of the modules that are running, outermost first."""

    names: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    spans: list[tuple[int, int, str]] = field(default_factory=list)

    def enter(self, name: str) -> None:
        """A module begins."""
        self.names.append(name)
        self.starts.append(_sequence())

    def leave(self) -> None:
        """The innermost module ends; what autograd recorded within it is its own."""
        if self.names:
            self.spans.append((self.starts.pop(), _sequence(), self.names.pop()))

    def of_backward(self) -> str | None:
        """The module whose forward pass recorded the node that autograd is at, None outside a backward pass."""
        node = torch._C._current_autograd_node()  # noqa: SLF001 - torch has no public way to ask
        if node is None:
            return None
        number = node._sequence_nr()  # noqa: SLF001 - as above
        around = [(stop - start, name) for start, stop, name in self.spans if start <= number < stop]
        return min(around)[1] if around else None


def _sequence() -> int:
    """The number that autograd gives to the next node of this thread."""
    return int(torch.autograd._get_sequence_nr())  # type: ignore[attr-defined]  # noqa: SLF001 - torch has no public way to ask


@contextmanager
def module_stack(model: nn.Module) -> Iterator[_Stack]:
    """Within it the stack knows which module runs; hooks are gone after."""
    stack = _Stack()
    handles = []

    def leave(_module: nn.Module, _args: object, _output: object) -> None:
        # What a hook returns would take the place of the module's output.
        stack.leave()

    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda _m, _a, n=name: stack.enter(n)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def model_line() -> str | None:
    """`file.py:123` of the innermost frame that belongs to neither torch nor this package."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the documented way to walk frames cheaply
    torch_home = str(Path(torch.__file__).parent)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith((torch_home, str(OWN), "<")):
            return f"{Path(file).name}:{frame.f_lineno}"
        frame = frame.f_back
    return None


class OriginFinder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every op and keeps the first whose inputs are finite and whose output is not."""

    def __init__(self, stack: _Stack, bad_parameters: Mapping[int, str]) -> None:
        """Watch with the stack of running modules.

        Args:
            stack: knows the running module.
            bad_parameters: data pointer to name of the parameters that are not finite to begin with.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = stack
        self.bad_parameters = bad_parameters
        self.origin: Origin | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op, then look at what came out."""
        kwargs = kwargs or {}
        if self.origin is not None or str(func) in QUIET:
            return func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        named = tuple(
            name for leaf in inputs if (name := self.bad_parameters.get(leaf.data_ptr())) and nonfinite_count(leaf)
        )
        # A mask's -inf is finite for this purpose: it is meant. NaN and +inf inputs were made by an earlier op.
        clean = not any(_spoiled(leaf) for leaf in inputs)
        masked = any(_masked_row(leaf) for leaf in inputs) if clean else False
        largest = max((_largest(leaf) for leaf in inputs), default=0.0) if clean else 0.0
        outside = clean and _outside_domain(func, inputs)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        products = str(func) in PRODUCTS
        spoiled = next((leaf for leaf in outputs if leaf.is_floating_point() and _spoiled(leaf, either=products)), None)
        if spoiled is not None and (clean or named) and not _copies(func):
            self.origin = Origin(
                op=str(func).removesuffix(".default"),
                module=(self.stack.names[-1] if self.stack.names else self.stack.of_backward()) or None,
                source=model_line(),
                dtype=str(spoiled.dtype).removeprefix("torch."),
                largest_input=largest,
                nonfinite=nonfinite_count(spoiled),
                elements=spoiled.numel(),
                has_infinity=bool(torch.isinf(spoiled).any()),
                outside_domain=outside,
                masked_row=masked,
                backward=not self.stack.names,
                parameters=named,
            )
        return result


def _spoiled(tensor: Tensor, *, either: bool = False) -> bool:
    """Whether the tensor holds NaN or +inf; with `either`, also -inf, which no product of a mask's making holds."""
    if not nonfinite_count(tensor):
        return False
    if either:
        return True
    return bool(torch.isnan(tensor).any()) or bool((tensor == float("inf")).any())


def _outside_domain(func: Any, inputs: list[Tensor]) -> bool:
    """Whether the op is a division by zero, or a root or logarithm of a number that has none."""
    name = str(func).split(".")[1]
    if not inputs:
        return False
    if name in {"div", "reciprocal", "rsqrt"}:
        return bool((inputs[-1] == 0).any()) or (name == "rsqrt" and bool((inputs[-1] < 0).any()))
    if name in {"log", "log2", "log10"}:
        return bool((inputs[-1] <= 0).any())
    return name in {"sqrt", "asin", "acos", "log1p"} and bool((inputs[-1] < 0).any())


def _masked_row(tensor: Tensor) -> bool:
    if tensor.dim() == 0 or tensor.shape[-1] == 0 or not nonfinite_count(tensor):
        return False
    return bool((tensor == float("-inf")).all(dim=-1).any())


def _largest(tensor: Tensor) -> float:
    if tensor.numel() == 0:
        return 0.0
    finite = torch.where(torch.isfinite(tensor), tensor, torch.zeros_like(tensor))
    return float(finite.abs().max())


def _copies(func: Any) -> bool:
    """A view or an uninitialised allocation makes no value."""
    return bool(getattr(func, "is_view", False)) or "empty" in str(func)


def find_origin(model: nn.Module, run: Any) -> Origin | None:
    """The first op of `run()` that turns finite inputs into a non-finite output, None if every value stays finite.

    Args:
        model: whose modules name the place.
        run: a callable without arguments: the forward pass, or forward and backward.
    """
    bad = {p.data_ptr(): name for name, p in model.named_parameters() if nonfinite_count(p.detach())}
    with module_stack(model) as stack:
        finder = OriginFinder(stack, bad)
        with finder:
            run()
    return finder.origin
