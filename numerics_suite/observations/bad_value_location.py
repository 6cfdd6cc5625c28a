"""Where a value stops being finite: the first op with finite inputs and a non-finite output that the result descends from.

Works on the forward pass and on the backward pass, whose ops run under the same dispatch mode, through autocast,
checkpointing, fused kernels, hand-written backward passes and the optimizer's own step. A NaN that is discarded (the
unused side of a `where`) is not reported: each non-finite tensor records the op that it descends from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from numerics_suite.devices.memory import reraise_if_fatal
from numerics_suite.engine import flex_rule
from numerics_suite.engine.true_fp64 import LiftToFp64
from numerics_suite.observations.domain import has_masked_row, is_outside_domain, means_infinity
from numerics_suite.observations.finiteness import nonfinite_count
from numerics_suite.observations.module_trace import ModuleStack, current_node, module_stack

QUIET = {"aten.detach.default", "aten.empty.memory_format", "aten.empty_like.default", "aten.new_empty.default"}
"""Ops that compute nothing: their result was computed elsewhere or is not written yet."""

MOST = 16
"""Most origins that are kept; beyond this number the first one is reported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The op where a value stopped being finite.

    Attributes:
        op: such as `aten.softmax.int`.
        module: dotted name, None outside every module, in the model's own forward pass, or where unknown.
        source: `file.py:123` of the model's own line (of the backward pass: of the forward line that it belongs to, or
            of the hand-written backward), None where unknown.
        dtype: of the output.
        largest_input: largest magnitude of the finite inputs.
        nonfinite: non-finite elements of the output.
        elements: elements of the output.
        has_infinity: infinities among them, as an overflow leaves.
        outside_domain: it divided by zero, or took a root or logarithm outside its domain.
        masked_row: the input holds a row without any finite value, as a fully masked row is.
        backward: it happened in the backward pass.
        parameters: parameters and buffers among its inputs that are themselves not finite (then they are the origin).
        node: autograd's node in the backward pass, such as `SqrtBackward0`.
        inputs: dtype, shape and largest magnitude of each floating input, as text.
        finite_in_fp64: whether the same op on the same inputs is finite in float64; None where it cannot be run there.
        written: the parameter that the optimizer wrote, None elsewhere.
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
    node: str | None = None
    inputs: str = ""
    finite_in_fp64: bool | None = None
    written: str | None = None


@dataclass(slots=True)
class _Call:
    """One op: its arguments as `(args, kwargs)` with the values that they had, and the floating tensors as they are."""

    func: Any
    before: Any
    sources: list[Tensor]

    @property
    def inputs(self) -> list[Tensor]:
        """The floating arguments with the values that they had."""
        return [leaf for leaf in tree_leaves(self.before) if _is_floating(leaf)]

    def bad_addresses(self) -> list[int]:
        """Storages of the arguments that were not finite."""
        return [_address(leaf) for leaf, held in zip(self.sources, self.inputs, strict=True) if nonfinite_count(held)]


class OriginFinder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches every op and keeps those that turn finite inputs into a non-finite output."""

    def __init__(self, stack: ModuleStack, bad: Mapping[int, str], parameters: Mapping[int, str]) -> None:
        """Watch with the stack of running modules.

        Args:
            stack: knows the running module.
            bad: address of the storage to name, of parameters and buffers that are not finite to begin with.
            parameters: the same, of every parameter.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack, self.bad, self.parameters = stack, bad, parameters
        self.found: list[Origin] = []
        self.constants: set[int] = set()
        self.spoiled: dict[int, int] = {}
        """Address of a storage that holds a value which is not finite → index of the origin that it goes back to."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the op, then check its output."""
        kwargs = kwargs or {}
        self.stack.note()
        if str(func) in QUIET:
            return func(*args, **kwargs)
        mutates = func._schema.is_mutable  # noqa: SLF001 - as torch's own modes ask
        before = tree_map(_cloned, (args, kwargs)) if mutates else (args, kwargs)
        call = _Call(func, before, [leaf for leaf in tree_leaves((args, kwargs)) if _is_floating(leaf)])
        result = func(*args, **kwargs)
        self._look(call, [leaf for leaf in tree_leaves((result, args[:1] if mutates else ())) if _is_floating(leaf)])
        return result

    def _look(self, call: _Call, outputs: list[Tensor]) -> None:
        bad = [leaf for leaf in outputs if nonfinite_count(leaf)]
        index = min((self.spoiled[a] for a in call.bad_addresses() if a in self.spoiled), default=None) if bad else None
        given = {_address(leaf) for leaf in call.sources}
        for leaf in outputs:
            if _address(leaf) not in given:  # memory made anew, whatever it held before
                self.spoiled.pop(_address(leaf), None)
        if bad and index is None and not call.func.is_view:
            index = self._new(call, bad)
        if index is not None:
            self.spoiled.update((_address(leaf), index) for leaf in bad)

    def _new(self, call: _Call, bad: list[Tensor]) -> int | None:
        """Keep an origin if this op is one: the inputs are finite, but for a mask's -inf, or weights that are not."""
        named = tuple(dict.fromkeys(self.bad[a] for a in call.bad_addresses() if a in self.bad))
        clean = not any(_is_nan_or_positive(leaf) for leaf in call.inputs)
        meant = not named and means_infinity(call.func, call.before, call.inputs)
        worst = next((leaf for leaf in bad if not meant or _is_nan_or_positive(leaf)), None)
        if worst is None or not (clean or named) or "empty" in str(call.func) or len(self.found) >= MOST:
            return None
        if not call.inputs:
            self.constants.add(len(self.found))
        wide = None if named else _finite_in_fp64(call, worst, meant=meant)
        self.found.append(replace(self._origin(call, worst, named), finite_in_fp64=wide))
        return len(self.found) - 1

    def _origin(self, call: _Call, output: Tensor, named: tuple[str, ...]) -> Origin:
        place, node = self.stack.place(find_origin.__code__), current_node()
        written = None if self.stack.names or node is not None else self.parameters.get(_address(output))
        module = place.module if written is None else written.rpartition(".")[0]
        return Origin(
            op=str(call.func).removesuffix(".default"),
            module=module or None,
            source=place.source,
            dtype=str(output.dtype).removeprefix("torch."),
            largest_input=max((_largest(leaf) for leaf in call.inputs), default=0.0),
            nonfinite=nonfinite_count(output),
            elements=output.numel(),
            has_infinity=bool(torch.isinf(output).any()),
            outside_domain=not named and is_outside_domain(call.func, call.before),
            masked_row=not named and has_masked_row(call.func, call.before, call.inputs),
            backward=node is not None and not self.stack.names,
            parameters=named,
            node=None if node is None or self.stack.names else node.name(),
            inputs=", ".join(_described(leaf) for leaf in call.inputs[:4]),
            written=written,
        )

    def chosen(self, result: object) -> Origin | None:
        """The origin that the result goes back to; the first one where that is not known.

        Args:
            result: of the run; its floating tensors are looked at.
        """
        bad = [leaf for leaf in tree_leaves(result) if _is_floating(leaf) and nonfinite_count(leaf)]
        traced = [self.spoiled[_address(leaf)] for leaf in bad if _address(leaf) in self.spoiled]
        if traced:
            return self.found[min(traced)]
        made = [origin for index, origin in enumerate(self.found) if index not in self.constants]
        return next(iter(made or self.found), None)


flex_rule.watched_by(OriginFinder)


def _is_floating(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _is_nan_or_positive(tensor: Tensor) -> bool:
    """Whether it holds NaN or +inf, which no mask holds."""
    if not nonfinite_count(tensor):
        return False
    return bool(torch.isnan(tensor).any()) or bool((tensor == float("inf")).any())


def _largest(tensor: Tensor) -> float:
    if tensor.numel() == 0:
        return 0.0
    finite = torch.where(torch.isfinite(tensor), tensor, torch.zeros_like(tensor))
    return float(finite.abs().max())


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} up to {_largest(tensor):.4g}"


def _finite_in_fp64(call: _Call, output: Tensor, *, meant: bool) -> bool | None:
    """Run the op again on the same inputs in float64: if that is finite, the value left the range of its dtype."""
    args, kwargs = tree_map(_cloned, call.before)
    try:
        with torch.no_grad(), LiftToFp64({}):
            again = call.func(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 - an op without a float64 kernel says nothing
        reraise_if_fatal(error)
        return None
    bad = torch.isnan(output) | (output == float("inf")) if meant else ~torch.isfinite(output)
    for leaf in tree_leaves(again):
        if _is_floating(leaf) and leaf.shape == output.shape:
            return bool(torch.isfinite(leaf[bad]).all())
    return None


def find_origin(model: nn.Module, run: Callable[[], object]) -> Origin | None:
    """The first op of `run()` that turns finite inputs into a non-finite output, None if every value stays finite.

    Args:
        model: whose modules name the place.
        run: a callable without arguments: the forward pass, or forward and backward. Its result holds the tensors that
            must be finite, which decides which of several NaNs matters.
    """
    bad = {_address(p): name for name, p in model.named_parameters() if nonfinite_count(p.detach())}
    bad |= {_address(b): name for name, b in model.named_buffers() if _is_floating(b) and _is_nan_or_positive(b)}
    parameters = {_address(p): name for name, p in model.named_parameters()}
    with module_stack(model) as stack:
        finder = OriginFinder(stack, bad, parameters)
        with finder:
            result = run()
    with torch.no_grad():
        return finder.chosen(result)
