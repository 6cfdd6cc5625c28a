"""The device's kernels: the CPU's, run on the memory of the device tensors.

Most ops need nothing of their own: `_generic` gives each op of PyTorch that computes one kernel that checks
the devices of its arguments as CUDA does, runs the CPU's kernel and labels the results. Views and changes of shape are
PyTorch's own C++ for CPU tensors, which looks at sizes and strides only. What is left is written out below: copies, new
tensors, resizing and the ops that a host waits for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from numerics_standin import random_state, streams
from numerics_standin.memory import NAME, reserve, to_device, to_host
from numerics_standin.switches import check_alive, raise_lost, switches

if TYPE_CHECKING:
    from collections.abc import Iterator

aten = torch.ops.aten
_KEY = "PrivateUse1"
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_CPU_DEVICE = torch.device("cpu")

# Below autograd and autocast: a CPU autocast region of the caller must not reach into a device kernel.
_BELOW = torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradCPU)
for _key in ("ADInplaceOrView", "AutocastCPU"):
    _BELOW = _BELOW | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))
_below_autograd = torch._C._ExcludeDispatchKeyGuard

_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
"""Ops whose index tensors may be on the CPU, as on CUDA."""

_NO_CPU_SCALARS = {
    *("mm", "addmm", "bmm", "baddbmm", "mv", "dot", "embedding", "index_select", "gather", "scatter", "scatter_"),
    *("scatter_add", "scatter_add_", "index_add", "index_add_", "native_layer_norm", "convolution", "take"),
    *("nll_loss_forward", "cat", "stack", "embedding_dense_backward", "index_copy", "index_copy_"),
}
"""Ops of CUDA that refuse even 0-d CPU tensors: not element-wise ones."""

_WAITS = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "unique_consecutive", "_unique2"),
    *("unique_dim", "repeat_interleave", "bincount", "allclose"),
}
"""Ops whose result, or its shape, the host waits for: they synchronize the current stream."""


class _Call:
    """One call of an op: finds the device of its arguments and brings them to the host."""

    __slots__ = ("arguments", "index", "owners", "plan")

    def __init__(self, plan: _Plan, *arguments: Any) -> None:
        self.plan = plan
        self.arguments = arguments
        self.index = -1
        self.owners: dict[int, Tensor] = {}

    def host(self, value: Any, indices: bool = False) -> Any:
        """Return `value` with its tensors brought to the host; `indices`: it may hold CPU index tensors."""
        if isinstance(value, Tensor):
            return self._host_tensor(value, indices)
        kind = type(value)
        if kind is list or kind is tuple:
            if value and type(value[0]) is int:
                return value
            return [self.host(item, indices) for item in value]
        if kind is torch.device:
            if value.type == NAME and self.index < 0:
                self.index = streams.device_index(value)
            return _CPU_DEVICE
        return value

    def _host_tensor(self, tensor: Tensor, indices: bool) -> Tensor:
        index = tensor.get_device()
        if index < 0:
            scalar = self.plan.cpu_scalars and tensor.dim() == 0 and tensor.device.type == "cpu"
            if not scalar and not (indices and tensor.dtype in _INDEX_DTYPES):
                self.refuse(tensor)
            return tensor
        if index != self.index:
            if self.index >= 0:
                self.refuse(tensor)
            self.index = index
        host = to_host(tensor)
        self.owners[id(host)] = tensor
        return host

    def refuse(self, tensor: Tensor) -> None:
        """Refuse a tensor of another device, in CUDA's words."""
        devices = [other.get_device() for other in _tensors(self.arguments)]
        index = self.index if self.index >= 0 else next((other for other in devices if other >= 0), 0)
        if self.plan.index_place >= 0 and tensor is self.arguments[0][0]:
            message = f"indices should be either on cpu or on the same device as the indexed tensor ({tensor.device})"
            raise RuntimeError(message)
        message = (
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{NAME}:{index} and {tensor.device}!"
        )
        raise RuntimeError(message)

    def device(self, result: Any) -> Any:
        """Return an op's result with its tensors labelled as the device's."""
        if isinstance(result, Tensor):
            return self.owners.get(id(result)) if id(result) in self.owners else to_device(result, self.index)
        if isinstance(result, (list, tuple)):
            return type(result)(self.device(item) for item in result)
        return result


_INDEX_DTYPES = {torch.int64, torch.int32, torch.uint8, torch.bool}


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


class _Plan:
    """What is worked out once for each op."""

    __slots__ = ("cpu_scalars", "generator", "index_place", "op", "outs", "seeded", "waits", "written")

    def __init__(self, op: Any) -> None:
        schema = op._schema
        name = schema.name.partition("::")[2]
        names = [argument.name for argument in schema.arguments]
        self.op = op
        self.index_place = names.index("indices") if name in _INDEXING else -1
        self.cpu_scalars = name not in _NO_CPU_SCALARS
        self.waits = name in _WAITS
        self.generator = names.index("generator") if "generator" in names else -1
        self.seeded = self.generator < 0 and torch.Tag.nondeterministic_seeded in op.tags
        self.outs = [a.name for a in schema.arguments if a.kwarg_only and a.alias_info and a.alias_info.is_write]
        self.written = [
            place
            for place, a in enumerate(schema.arguments)
            if not a.kwarg_only and a.alias_info and a.alias_info.is_write
        ]


_PLANS: dict[Any, _Plan] = {}


def _run(plan: _Plan, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if switches.lost or switches.kernels_left >= 0:
        check_alive()
    call = _Call(plan, args, kwargs)
    place = plan.index_place
    if place < 0:
        host_args = [call.host(argument) for argument in args]
    else:
        host_args = [call.host(argument, at == place) for at, argument in enumerate(args)]
    outs = {name: kwargs.pop(name) for name in plan.outs} if plan.outs else None
    host_kwargs = {name: call.host(argument) for name, argument in kwargs.items()}
    for at in plan.written:
        _check_written(call, args[at])
    if outs is not None:
        return _run_into(plan, call, outs, host_args, host_kwargs)
    return call.device(_compute(plan, call, host_args, host_kwargs))


def _check_written(call: _Call, target: Any) -> None:
    for tensor in target if isinstance(target, (list, tuple)) else [target]:
        if isinstance(tensor, Tensor) and tensor.get_device() < 0 <= call.index:
            call.refuse(tensor)


def _compute(plan: _Plan, call: _Call, args: list[Any], kwargs: dict[str, Any]) -> Any:
    if call.index < 0:
        call.index = streams.current_device()
    if call.index > 0:
        streams.follow_autograd(call.index)
    if plan.waits:
        streams.current_stream(call.index).complete()
    if plan.generator >= 0:
        _give_generator(plan, call.index, args, kwargs)
    try:
        with _below_autograd(_BELOW):
            if plan.seeded:
                with random_state.drawing_from(random_state.default_generators[call.index]):
                    return plan.op(*args, **kwargs)
            return plan.op(*args, **kwargs)
    except (IndexError, RuntimeError) as error:
        # A CUDA kernel checks its indices on the device, where it can only give up for good.
        if switches.index_asserts and ("out of range" in str(error) or "out of bounds" in str(error)):
            raise_lost()
        raise


def _give_generator(plan: _Plan, index: int, args: list[Any], kwargs: dict[str, Any]) -> None:
    place = plan.generator
    positional = place < len(args)
    given = args[place] if positional else kwargs.get("generator")
    if given is None:
        given = random_state.default_generators[index]
    elif not random_state.belongs_to(given, index):
        message = f"Expected a '{NAME}' device type for generator but found '{given.device.type}'"
        raise RuntimeError(message)
    if positional:
        args[place] = given
    else:
        kwargs["generator"] = given


def _run_into(plan: _Plan, call: _Call, outs: dict[str, Tensor], args: list[Any], kwargs: dict[str, Any]) -> Any:
    """Run an `out=` overload: into fresh tensors, and then into the given ones, which it resizes as PyTorch does."""
    for out in outs.values():
        call.host(out)
        _check_written(call, out)
    fresh = {name: torch.empty(0, dtype=out.dtype, device="cpu") for name, out in outs.items()}
    _compute(plan, call, args, {**kwargs, **fresh})
    for name, out in outs.items():
        if out.shape != fresh[name].shape:
            out.resize_(fresh[name].shape)
        with _below_autograd(_BELOW):
            to_host(out).copy_(fresh[name])
    results = tuple(outs.values())
    return results[0] if len(results) == 1 else results


def fallback(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an op that has no registration: those without any kernel of their own, and other libraries' ops."""
    plan = _PLANS.get(op)
    if plan is None:
        plan = _PLANS[op] = _Plan(op)
    return _run(plan, args, kwargs)


def _overload(name: str) -> Any:
    packet, _, overload = name.partition("::")[2].partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _generic(name: str) -> Any:
    plan = None

    def kernel(*args: Any, **kwargs: Any) -> Any:
        nonlocal plan
        if plan is None:
            plan = _Plan(_overload(name))
        return _run(plan, args, kwargs)

    return kernel


def _metadata_only(name: str) -> Any:
    """PyTorch's own CPU kernel on the device tensor itself: it reads sizes and strides and touches no memory."""
    op = None

    def kernel(*args: Any, **kwargs: Any) -> Any:
        nonlocal op
        if op is None:
            op = _overload(name)
        if switches.lost:
            check_alive()
        return op.redispatch(_CPU, *args, **kwargs)

    return kernel


def on_host(op: Any, function: Any, *, index_first: bool = False) -> Any:
    """Make a device kernel for `op` of a function of CPU tensors; `index_first`: it is given the device index, too."""
    plan = _Plan(op)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        check_alive()
        call = _Call(plan, args, kwargs)
        args = [call.host(argument) for argument in args]
        kwargs = {name: call.host(argument) for name, argument in kwargs.items()}
        if index_first:
            args = [call.index, *args]
        with _below_autograd(_BELOW):
            return call.device(function(*args, **kwargs))

    return kernel


# --- new tensors ------------------------------------------------------------------------------------------------------


def _empty(op: Any) -> Any:
    def kernel(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        if switches.lost or switches.kernels_left >= 0:
            check_alive()
        if pin_memory:
            message = "Only dense CPU tensors can be pinned"
            raise RuntimeError(message)
        index = streams.device_index(device)
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
        if op is aten.empty.memory_format:
            count = 1
            for extent in args[0]:
                count *= extent
            reserve(index, count * dtype.itemsize)
        return to_device(op(*args, device=_CPU_DEVICE, **kwargs), index)

    return kernel


# --- copies -----------------------------------------------------------------------------------------------------------


def _to_copy(
    source: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: torch.device | None = None,
    pin_memory: Any = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Tensor:
    check_alive()
    index = source.get_device()
    options = {"dtype": dtype, "layout": layout, "memory_format": memory_format}
    if device is None or device.type == NAME:
        target = index if device is None else streams.device_index(device)
        with _below_autograd(_BELOW):
            return to_device(aten._to_copy.default(to_host(source), **options), target)
    if device.type != "cpu":
        return aten._to_copy.default(to_host(source), device=device, **options)
    with _below_autograd(_BELOW):
        result = aten._to_copy.default(to_host(source), **options)
    if non_blocking and switches.late_copies:
        values = result.clone()
        _make_stale(result)
        _put_off(result, values, index)
    else:
        streams.current_stream(index).complete()
    return result


def _make_stale(tensor: Tensor) -> None:
    """Fill memory that a late copy has not reached with what no program takes for a result."""
    with _below_autograd(_BELOW):
        if tensor.is_floating_point() or tensor.is_complex():
            tensor.fill_(float("nan"))
        else:
            tensor.zero_()


def _put_off(target: Tensor, values: Tensor, index: int) -> None:
    def complete() -> None:
        with _below_autograd(_BELOW):
            target.copy_(values)

    streams.current_stream(index).put_off(complete)


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    check_alive()
    to, origin = target.get_device(), source.get_device()
    if to >= 0:
        if origin < 0:
            # In a stream, a copy to the device comes after the copies from it, whose target may be this source.
            streams.current_stream(to).complete()
        with _below_autograd(_BELOW):
            to_host(target).copy_(source if origin < 0 else to_host(source))
        return target
    with _below_autograd(_BELOW):
        values = to_host(source)
        if non_blocking and switches.late_copies:
            _put_off(target, values.to(target.dtype, copy=True).expand_as(target), origin)
        else:
            streams.current_stream(origin).complete()
            target.copy_(values)
    return target


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    return _copy_(target, source, non_blocking)


# --- shapes and storages ----------------------------------------------------------------------------------------------


def _resize_(tensor: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
    count = 1
    for extent in size:
        count *= extent
    if (count + tensor.storage_offset()) * tensor.element_size() > tensor.untyped_storage().nbytes():
        # Storages over foreign memory cannot grow; the tensor moves to a new one.
        grown = torch.empty(count, dtype=tensor.dtype, device=tensor.device)
        with _below_autograd(_BELOW):
            old = to_host(tensor).reshape(-1)
            to_host(grown)[: old.numel()].copy_(old)
        tensor.data = grown
    aten.resize_.default.redispatch(_CPU, tensor, size, memory_format=memory_format)
    return tensor


def _is_pinned(tensor: Tensor, device: Any = None) -> bool:
    return hasattr(tensor.untyped_storage(), "standin_pinned")


def _pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    if tensor.get_device() >= 0:
        message = f"cannot pin '{tensor.type()}' only dense CPU tensors can be pinned"
        raise RuntimeError(message)
    with _below_autograd(_BELOW):
        pinned = tensor.clone()
    pinned.untyped_storage().standin_pinned = True
    return pinned


def _record_stream(tensor: Tensor, stream: Any) -> None:
    """Do nothing: memory is in use as long as a tensor lives."""


_METADATA = {
    *("aten::set_.source_Storage", "aten::set_.source_Storage_storage_offset", "aten::set_.source_Tensor"),
    *("aten::set_", "aten::is_set_to", "aten::view", "aten::as_strided", "aten::_reshape_alias", "aten::unfold"),
}


def register(library: torch.library.Library, fallbacks: torch.library.Library) -> None:
    """Register every kernel."""
    own = {
        "aten::empty.memory_format": _empty(aten.empty.memory_format),
        "aten::empty_strided": _empty(aten.empty_strided.default),
        "aten::_to_copy": _to_copy,
        "aten::copy_": _copy_,
        "aten::_copy_from": _copy_from,
        "aten::_copy_from_and_resize": _copy_from,
        "aten::resize_": _resize_,
        "aten::is_pinned": _is_pinned,
        "aten::_pin_memory": _pin_memory,
        "aten::record_stream": _record_stream,
    }
    for name, kernel in own.items():
        library.impl(name, kernel, _KEY)
    for name in ("aten::is_pinned", "aten::_pin_memory"):
        library.impl(name, own[name], "CPU")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::") and name not in own:
            kernel = _metadata_only(name) if name in _METADATA else _generic(name) if _computes(name) else None
            if kernel is not None:
                library.m.impl(name[6:], torch._C.DispatchKey.PrivateUse1, kernel)
    fallbacks.fallback(fallback, _KEY)


_has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key


def _computes(name: str) -> bool:
    """Whether an op of aten gets the generic kernel."""
    if _has_kernel(name, "CompositeImplicitAutograd"):
        return False
    composite = _has_kernel(name, "CompositeExplicitAutograd")
    functional = _has_kernel(name, "CompositeExplicitAutogradNonFunctional")
    if not (composite or functional or _has_kernel(name, "CPU")):
        return False
    schema = torch._C._get_schema(*_schema_key(name))
    packet = schema.name.partition("::")[2]
    if any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns):
        return not composite  # views: PyTorch's own, made of as_strided
    if (composite or functional) and packet.endswith(("_copy", "_scatter")):
        return False  # they take offsets into the storage, which the host's tensors have not
    if composite and any(a.name == "device" for a in schema.arguments):
        return False  # they may be asked for another device; made of empty
    return packet not in {
        "as_strided_",
        "transpose_",
        "squeeze_",
        "unsqueeze_",
        "t_",
        "swapdims_",
        "detach_",
        "set_data",
    }


def _schema_key(name: str) -> tuple[str, str]:
    packet, _, overload = name.partition(".")
    return packet, overload
