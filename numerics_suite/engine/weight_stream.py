"""Gradients in float64 of a model whose float64 copy does not fit: one block upcast at a time.

Under plain autograd the graph would keep every upcast block alive until the backward pass. Here a unit (a member of an
outermost `ModuleList`, else a module that owns parameters itself) runs without a graph; its backward pass runs it again
with float64 leaves, passes their gradients on and drops both. A linear layer or an embedding outside the blocks needs
no float64 leaf: its backward pass is written out, so a large head is upcast in pieces only.
"""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.checkpoint import get_device_states, set_device_states

from numerics_suite.devices import random_state
from numerics_suite.engine.reference_ops import replaced_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class GradientSink:
    """Sums the units' parts of each gradient; passes it on, or keeps it, once complete.

    Args:
        on_gradient: Called with name and gradient once complete. Without it gradients are kept.
    """

    def __init__(self, on_gradient: Callable[[str, Tensor], None] | None) -> None:
        """Nothing is there yet."""
        self.gradients: dict[str, Tensor] = {}
        self._on_gradient = on_gradient
        self._awaited: Counter[str] = Counter()

    def expect(self, names: Iterator[str] | list[str]) -> None:
        """Expect one part of each of `names`."""
        self._awaited.update(names)

    def add(self, name: str, part: Tensor | None) -> None:
        """Take one part of the gradient of parameter `name`; None where the loss does not reach it."""
        if part is not None:
            whole = self.gradients.get(name)
            # A tied weight (embedding and head) gets one part from each use; dL/dW is their sum.
            self.gradients[name] = part if whole is None else whole.add_(part)
        self._awaited[name] -= 1
        if self._on_gradient is not None and not self._awaited[name] and name in self.gradients:
            self._pass_on(name)

    def finish(self) -> None:
        """Pass on gradients that lack only parts that the loss does not reach."""
        if self._on_gradient is not None:
            for name in list(self.gradients):
                self._pass_on(name)

    def _pass_on(self, name: str) -> None:
        assert self._on_gradient is not None
        with _disable_current_modes():  # what takes it is no part of the run
            self._on_gradient(name, self.gradients.pop(name))


@contextmanager
def recomputed_blocks(model: nn.Module, on_gradient: Callable[[str, Tensor], None] | None) -> Iterator[GradientSink]:
    """Run each unit of `model` without a graph and again in the backward pass; parameters stay as stored.

    Restoring the model is `reference_ops.preserved`'s work, within which this must run. A cache of keys and values would be
    written twice, so `use_cache` is off in the configuration meanwhile.
    """
    wanted = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    sink = GradientSink(on_gradient)
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    with replaced_parameters(model, _frozen_alias) as aliases:
        names = {id(alias): name for name, alias in aliases.items() if name in wanted}
        for module in _units(model):
            unit = Unit(
                module=module, inner=module.forward, names=names, sink=sink, trigger=torch.zeros((), requires_grad=True)
            )
            module.forward = unit
        # Each block runs twice; a second run would append its keys again and attend to twice the tokens.
        if use_cache and torch.is_grad_enabled():
            config.use_cache = False  # type: ignore[union-attr]
        try:
            yield sink
            sink.finish()
        finally:
            if use_cache:
                config.use_cache = use_cache  # type: ignore[union-attr]


def _frozen_alias(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach(), requires_grad=False)


def _units(model: nn.Module) -> Iterator[nn.Module]:
    if any(parameter is not None for parameter in model._parameters.values()):  # noqa: SLF001
        yield model
        return
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from (block for block in child if any(True for _ in block.parameters()))
        else:
            yield from _units(child)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Stands in for the `forward` of a module.

    Attributes:
        module: The module; its parameters are as stored and frozen.
        inner: Its own forward.
        names: Id of a stored parameter that requires a gradient → its name.
        sink: Takes the gradients.
        trigger: A scalar that requires a gradient, so that autograd calls the backward pass.
    """

    module: nn.Module
    inner: Callable[..., Any]
    names: dict[int, str]
    sink: GradientSink
    trigger: Tensor

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the module; with gradients on, without a graph of its own."""
        if not torch.is_grad_enabled():
            return self.inner(*args, **kwargs)
        self.sink.expect([self.names[id(p)] for p in self.module.parameters() if id(p) in self.names])
        flat, spec = pytree.tree_flatten((args, kwargs))
        shape: list[Any] = []
        function = _written_out(self.module, self.inner) or _Recomputed
        # `trigger` is the one input that always requires a gradient. Without it the first unit, whose inputs are token ids,
        # would be left out of the graph and its backward pass would never be called.
        result = function.apply(self, spec, shape, self.trigger, *flat)
        return pytree.tree_unflatten(result, shape[0])

    def stored(self) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
        """Yield owner, key and parameter for each that requires a gradient, every place of a tied one."""
        for owner in self.module.modules():
            for key, parameter in owner._parameters.items():  # noqa: SLF001
                if id(parameter) in self.names:
                    yield owner, key, parameter  # type: ignore[misc]

    @contextmanager
    def wide_leaves(self) -> Iterator[dict[str, nn.Parameter]]:
        """Replace the stored parameters by float64 leaves and yield these by name."""
        places = list(self.stored())
        leaves: dict[str, nn.Parameter] = {}
        for owner, key, parameter in places:
            name = self.names[id(parameter)]
            # A parameter that two modules of the unit share gets one leaf, in which autograd adds both parts.
            if name not in leaves:
                leaves[name] = nn.Parameter(parameter.detach().double())
            owner._parameters[key] = leaves[name]  # noqa: SLF001
        try:
            yield leaves
        finally:
            for owner, key, parameter in places:
                owner._parameters[key] = parameter  # noqa: SLF001


class _Recomputed(torch.autograd.Function):
    """Any unit: the backward pass runs it again."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, spec: Any, shape: list[Any], trigger: Tensor, *flat: Any) -> tuple[Any, ...]:  # noqa: ARG004
        ctx.unit, ctx.spec = unit, spec
        ctx.places = [place for place, value in enumerate(flat) if isinstance(value, Tensor)]
        ctx.others = [None if isinstance(value, Tensor) else value for value in flat]
        ctx.save_for_backward(*(flat[place] for place in ctx.places))
        # Dropout must draw the same mask in both runs, else the gradient is that of another function.
        ctx.random = (torch.get_rng_state(), *get_device_states(*flat)) if unit.module.training else None
        args, kwargs = pytree.tree_unflatten(list(flat), spec)
        result, layout = pytree.tree_flatten(unit.inner(*args, **kwargs))
        shape.append(layout)
        # An output that the loss does not reach gives None here and not zeros, so what only it needs gets no gradient at all.
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(v for v in result if isinstance(v, Tensor) and not v.is_floating_point()))
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        unit: Unit = ctx.unit
        flat = list(ctx.others)
        for place, tensor in zip(ctx.places, ctx.saved_tensors, strict=True):
            flat[place] = tensor.detach().requires_grad_(tensor.requires_grad)
        args, kwargs = pytree.tree_unflatten(flat, ctx.spec)
        with unit.wide_leaves() as leaves, torch.enable_grad(), _same_random(ctx.random):
            result, _ = pytree.tree_flatten(unit.inner(*args, **kwargs))
            pairs = [(out, grad) for out, grad in zip(result, gradients, strict=True) if grad is not None]
            pairs = [(out, grad) for out, grad in pairs if isinstance(out, Tensor) and out.requires_grad]
            if pairs:
                torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        for name, leaf in leaves.items():
            unit.sink.add(name, leaf.grad)
        return (None, None, None, None, *(value.grad if isinstance(value, Tensor) else None for value in flat))


@contextmanager
def _same_random(state: Any) -> Iterator[None]:
    if state is None:
        with nullcontext():
            yield
        return
    with random_state.kept():
        torch.set_rng_state(state[0])
        set_device_states(state[1], state[2])
        yield


class _LinearUnit(torch.autograd.Function):
    """`nn.Linear` outside the blocks, with its backward pass written out."""

    @staticmethod
    def forward(
        ctx: Any, unit: Unit, _spec: Any, shape: list[Any], _trigger: Tensor, features: Tensor
    ) -> tuple[Tensor]:
        ctx.unit = unit
        ctx.save_for_backward(features)
        shape.append(pytree.tree_flatten(features)[1])
        return (unit.inner(features),)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (features,) = ctx.saved_tensors
        # y = x Wᵀ + b, so dW = dYᵀ x, db = Σ over rows of dY, dx = dY W.
        rows = gradient.reshape(-1, gradient.shape[-1])
        for _, key, parameter in ctx.unit.stored():
            part = rows.sum(0) if key == "bias" else rows.t() @ features.reshape(-1, features.shape[-1])
            ctx.unit.sink.add(ctx.unit.names[id(parameter)], part)
        back = (rows @ ctx.unit.module.weight).reshape(features.shape) if ctx.needs_input_grad[4] else None
        return None, None, None, None, back


class _EmbeddingUnit(torch.autograd.Function):
    """`nn.Embedding` outside the blocks, with its backward pass written out."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, _spec: Any, shape: list[Any], _trigger: Tensor, ids: Tensor) -> tuple[Tensor]:
        ctx.unit = unit
        ctx.save_for_backward(ids)
        shape.append(pytree.tree_flatten(ids)[1])
        return (unit.inner(ids),)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        (ids,) = ctx.saved_tensors
        table = ctx.unit.module
        # dW[i] = Σ of dY over the places where id i stands, but 0 for the padding row, as in PyTorch's own kernel.
        padding = -1 if table.padding_idx is None else table.padding_idx
        for _, _, parameter in ctx.unit.stored():
            part = torch.ops.aten.embedding_dense_backward(
                gradient, ids, table.num_embeddings, padding, table.scale_grad_by_freq
            )
            ctx.unit.sink.add(ctx.unit.names[id(parameter)], part)
        return (None,) * 5


def _written_out(module: nn.Module, inner: Any) -> Any:
    """Return the function for a module whose forward is torch's own, None for any other."""
    own = getattr(inner, "__func__", None)
    if own is nn.Linear.forward:
        return _LinearUnit
    if own is nn.Embedding.forward and module.max_norm is None:
        return _EmbeddingUnit
    return None
