"""Code shared by both references: which ops compute, which only move data, and how the model is restored."""

from __future__ import annotations

import sys
from collections import OrderedDict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import Enum, auto
from itertools import filterfalse
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from numerics_suite.core.attributes import with_attribute
from numerics_suite.devices.arithmetic import autocast_off
from numerics_suite.engine import flash_registry
from numerics_suite.engine.module_tree import configs_of, modules_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

WIDER: Final[dict[torch.dtype, torch.dtype]] = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float16: torch.float64,
    torch.complex64: torch.complex128,
    torch.complex32: torch.complex128,
} | {
    getattr(torch, name): torch.float64
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu")
    if hasattr(torch, name)
}
"""Lower floating dtype → the double one it is lifted to; other dtypes stay as they are."""


class LeanMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that knows module names and records what it could not lift.

    It does not pass each op through, and so does not import, `torch._dynamo`: compiled code runs eagerly under the
    references.

    Args:
        names: Module id → name, to say where an op was.
    """

    def __init__(self, names: Mapping[int, str]) -> None:
        """Start with nothing left out."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names
        self.left_out: dict[str, None] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Forward to `TorchDispatchMode`; declared only for its type."""
        super().__init_subclass__(**kwargs)  # type: ignore[no-untyped-call]

    def leave_out(self, what: object) -> None:
        """Record that `what`, in the module that runs now, could not be computed as required."""
        self.left_out[f"{module_running(self.names)}: {what}"] = None

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Kind(Enum):
    """What an op does to numbers."""

    VIEW = auto()
    """Returns an alias of its argument: running it on an upcast copy would cut that tie."""
    COMPOSITE = auto()
    """Composed of other ops; appears as one op only in inference mode, where it is decomposed."""
    MUTABLE = auto()
    """Writes to an argument."""
    EXACT = auto()
    """Moves, compares or fills: the result needs no rounding beyond the one conversion it may make."""
    RANDOM = auto()
    """Draws numbers."""
    FOREIGN = auto()
    """Not PyTorch's own; its inner ops cannot be seen."""
    COMPUTE = auto()
    """Everything else."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpPlan:
    """Properties of an op overload, worked out once.

    Attributes:
        kind: What it does to numbers.
        gathers: Whether it only picks rows or entries of its first argument.
        multiplies: Whether it is the product with a matrix that it names last, which may be upcast in pieces.
        written: Positions of the positional arguments that it writes to.
        written_names: Names of the keyword-only arguments that it writes to.
        returned: For each result, the position or name of the written argument that it is, or None.
        narrow_flag: Position of an argument `half_to_float`, which has no meaning in float64; -1 without one.
    """

    kind: Kind
    gathers: bool = False
    multiplies: bool = False
    written: tuple[int, ...] = ()
    written_names: tuple[str, ...] = ()
    returned: tuple[int | str | None, ...] = ()
    narrow_flag: int = -1


# The trap of both tables: an op listed here that does round would run in the lower float in both references, and its
# error would be invisible. Only ops whose every result element is an input element, a constant or an exact function
# of one (abs, neg, sign, floor, relu) belong here; `add` of two floats does not, nor does any sum.
_GATHERS: Final = frozenset({"embedding", "index_select", "gather", "index", "take", "_to_copy", "clone"})
_PRODUCTS: Final = frozenset({torch.ops.aten.mm.default, torch.ops.aten.addmm.default})
_EXACT: Final = _GATHERS | frozenset(
    """
    abs alias amax amin any all arange argmax argmin argsort bitwise_and bitwise_not bitwise_or bitwise_xor cat
    ceil clamp clamp_max clamp_min clone complex constant_pad_nd contiguous copy diagonal_copy empty empty_like
    empty_permuted empty_strided eq equal expand_copy eye fill flip floor full full_like ge gt is_nonzero
    isfinite isinf isnan isneginf isposinf le lift logical_and logical_not logical_or logical_xor lt masked_fill
    masked_scatter masked_select max max_pool2d_with_indices maximum median min minimum nan_to_num ne neg
    new_empty new_empty_strided new_full new_ones new_zeros nonzero ones ones_like pad permute_copy relu repeat
    repeat_interleave roll round scalar_tensor scatter select_scatter sgn sign slice_scatter sort split_copy
    split_with_sizes_copy stack topk tril triu trunc unbind_copy unfold_copy unique_consecutive view_copy where
    zeros zeros_like _local_scalar_dense _reshape_copy _to_copy _unique2 _unsafe_index _unsafe_masked_index
    _unsafe_view
    """.split()  # noqa: SIM905 - a list would take a line per name
)
_TRUSTED_NAMESPACES: Final = frozenset(
    {"aten", "prim", "prims", "c10d", "_c10d_functional", "_c10d_functional_autograd", "flex_lib"}
)
_PLANS: Final[dict[int, tuple[Any, OpPlan]]] = {}
"""By id: an op is hashed in Python, which costs more than all else that is looked up here. Ops that are held keep theirs."""


def plan_of(func: Any) -> OpPlan:
    """Return the plan of `func`, an `OpOverload`; worked out at its first use."""
    held = _PLANS.get(id(func))
    if held is None:
        held = _PLANS[id(func)] = func, _work_out(func)
    return held[1]


def _work_out(func: Any) -> OpPlan:  # noqa: PLR0911 - one return per kind
    schema = func._schema  # noqa: SLF001 - the only way to the schema of an overload
    packet = schema.name.split("::")[1]
    name = packet.removesuffix("_") if schema.is_mutable else packet
    if schema.name == "prim::device" or torch.Tag.inplace_view in func.tags:
        # A tensor subclass's device is read by an op without a registered kernel; it computes nothing.
        return OpPlan(kind=Kind.VIEW)
    # Attention carries the tag for its dropout; without dropout it draws nothing, and it must be computed.
    seeded = torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in name
    if schema.is_mutable:
        return _work_out_mutable(schema, Kind.RANDOM if seeded else Kind.MUTABLE)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):  # noqa: SLF001
        return OpPlan(kind=Kind.COMPOSITE)
    if any(result.alias_info is not None for result in schema.returns):
        return OpPlan(kind=Kind.VIEW)
    if func.namespace not in _TRUSTED_NAMESPACES:
        return OpPlan(kind=Kind.FOREIGN)
    if seeded:
        return OpPlan(kind=Kind.RANDOM)
    flags = [place for place, argument in enumerate(schema.arguments) if argument.name == "half_to_float"]
    return OpPlan(
        kind=Kind.EXACT if name in _EXACT else Kind.COMPUTE,
        gathers=name in _GATHERS,
        multiplies=func in _PRODUCTS,
        narrow_flag=flags[0] if flags else -1,
    )


def _work_out_mutable(schema: Any, kind: Kind) -> OpPlan:
    written: list[int] = []
    names: list[str] = []
    owner: dict[frozenset[str], int | str] = {}
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        key: int | str = argument.name if argument.kwarg_only else place
        (names if argument.kwarg_only else written).append(key)  # type: ignore[arg-type]
        owner[frozenset(argument.alias_info.before_set)] = key
    returned = tuple(
        None if result.alias_info is None else owner.get(frozenset(result.alias_info.before_set))
        for result in schema.returns
    )
    return OpPlan(kind=kind, written=tuple(written), written_names=tuple(names), returned=returned)


def widen(value: Any) -> Any:
    """Return an op's argument in double precision: tensors upcast, dtypes lifted, all else as it is."""
    # Widening is exact: each lower float's values are a subset of float64's, subnormals included.
    if isinstance(value, Tensor):
        wide = WIDER.get(value.dtype)
        if wide is None:
            return value
        return value.double() if wide is torch.float64 else value.to(wide)
    kind = type(value)
    if kind is torch.dtype:
        return WIDER.get(value, value)
    # Lists of integers are shapes and dims, the most common list; they are passed through unread.
    if kind in (list, tuple) and value and type(value[0]) is not int:
        return [widen(item) for item in value]
    return value


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of an op's result or argument."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def write_through(func: Any, plan: OpPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an in-place op in double and store the rounded result in the program's own tensor."""
    wide_args = [widen(argument) for argument in args]
    wide_kwargs = {name: widen(argument) for name, argument in kwargs.items()}
    result = func(*wide_args, **wide_kwargs)
    pairs = [(args[place], wide_args[place]) for place in plan.written if place < len(args)]
    pairs += [(kwargs[name], wide_kwargs[name]) for name in plan.written_names if name in kwargs]
    for target, source in pairs:
        # The one rounding of an in-place op happens in `copy_`, into the dtype that the program chose for its target.
        for stored, wide in zip(tensors_in(target), tensors_in(source), strict=True):
            if stored is not wide:
                if stored.shape != wide.shape:
                    stored.resize_(wide.shape)
                stored.copy_(wide)
    results = result if isinstance(result, tuple) else (result,)
    mapped = tuple(
        value if key is None else (args[key] if isinstance(key, int) else kwargs[key])
        for value, key in zip(results, plan.returned, strict=False)
    )
    return mapped if isinstance(result, tuple) else (mapped[0] if mapped else result)


def writes_lower(plan: OpPlan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors of a lower float that the op would write to."""
    targets = [args[place] for place in plan.written if place < len(args)]
    targets += [kwargs[name] for name in plan.written_names if name in kwargs]
    return [tensor for target in targets for tensor in tensors_in(target) if tensor.dtype in WIDER]


def module_running(names: Mapping[int, str]) -> str:
    """Return the name of the innermost module of `names` (by id) on the Python stack, "backward" without one."""
    frame = sys._getframe(1)  # noqa: SLF001 - walking the stack costs nothing until something is left out
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            return names[id(owner)] or "(root)"
        frame = frame.f_back  # type: ignore[assignment]
    return "backward"


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore modules (attributes, parameters, buffers, hooks, training flags) and configs on exit, error or not.

    Buffers are replaced by copies meanwhile, so that an in-place update does not reach the real ones. Dicts,
    lists and sets that a module or a config holds get their entries back; parameters keep what is written into them.
    """
    modules = modules_of(model)
    owners = (*modules, *configs_of(modules))
    held, empty = _entries([owner.__dict__ for owner in owners if isinstance(getattr(owner, "__dict__", 0), dict)])
    copies: dict[int, Tensor] = {}
    for module in modules:
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                # A batch norm counts batches and a rotary table grows in place: without the copy a reference would change the model.
                module._buffers[name] = copies.setdefault(id(buffer), buffer.detach().clone())  # noqa: SLF001
    try:
        yield
    finally:
        for holder in filter(None, empty):
            holder.clear()
        for holder, entries in held:
            holder.clear()
            (holder.extend if isinstance(holder, list) else holder.update)(entries)


def _entries(waiting: list[Any]) -> tuple[list[tuple[Any, Any]], list[Any]]:
    """Dicts, lists and sets, nested ones included, each with a copy of its entries; and those without any, once or more.

    Most are empty, the hooks of a module that has none: a walk over each would take as long as a tiny model's pass.
    """
    seen: set[int] = set()
    found: list[tuple[Any, Any]] = []
    empty: list[Any] = []
    while waiting:
        holder = waiting.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        found.append((holder, holder.copy()))
        values = holder.values() if isinstance(holder, dict) else holder
        nested = [value for value in values if type(value) in _CONTAINERS]
        waiting += filter(None, nested)
        empty += filterfalse(None, nested)
    return found, empty


_CONTAINERS: Final = frozenset({dict, OrderedDict, list, set})


@contextmanager
def replaced_parameters(
    model: nn.Module, make: Callable[[nn.Parameter], nn.Parameter]
) -> Iterator[dict[str, nn.Parameter]]:
    """Replace each parameter by `make(parameter)` (tied ones stay tied) and yield them by name, each once.

    Restoring is `preserved`'s work, within which this must run.
    """
    made: dict[int, nn.Parameter] = {}
    for module in modules_of(model):
        for name, parameter in module._parameters.items():  # noqa: SLF001
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = make(parameter)
                module._parameters[name] = made[id(parameter)]  # noqa: SLF001
    yield dict(model.named_parameters())


@contextmanager
def plain_kernels(model: nn.Module) -> Iterator[None]:
    """Switch to attention that a mode can see and experts that have float64 kernels, autocast off, until exit."""
    with ExitStack() as stack:
        stack.enter_context(autocast_off(*{parameter.device.type for parameter in model.parameters()}))
        # A kernel that a package calls through its own binding is no ATen op: the mode would never see it, nor its rounding.
        stack.enter_context(flash_registry.visible_attention(model))
        for config in configs_of(modules_of(model)):
            if getattr(config, "_experts_implementation", None) not in (None, "eager"):
                # Grouped products of experts (`_grouped_mm`) have no float64 kernel; the eager loop computes the same sums.
                stack.enter_context(with_attribute(config, "_experts_implementation_internal", "eager"))
        yield
