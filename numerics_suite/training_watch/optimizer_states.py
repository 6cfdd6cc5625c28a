"""How a watched loop steps, kept so that a copy of the model can be stepped alike: optimizers, their states, clipping, loss scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.numbers import jsonable, revived
from numerics_suite.training_watch.norms import is_shard

RATES = ("lr", "betas", "momentum", "weight_decay")
"""What a scheduler may change from step to step."""


PLAIN, BY_STEP = ("start", "max_norm", "scaled", "scale", "growth_interval", "backoff", "began"), ("rates", "norms")
"""Fields of a :class:`Loop` that a bundle holds as they are, and those that it holds by step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerState:
    """One optimizer as it was before a step.

    Attributes:
        kind: its class in `torch.optim`.
        groups: hyperparameters of each group.
        names: parameters of each group.
        state: by parameter and key; tensors on the CPU, or plain numbers.
    """

    kind: str
    groups: tuple[Mapping[str, Any], ...]
    names: tuple[tuple[str, ...], ...]
    state: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def rebuilt(self, model: nn.Module, more: Sequence[str] = ()) -> torch.optim.Optimizer:
        """The same optimizer over a copy of the model.

        Args:
            model: with parameters of these names; in another dtype, the state follows it.
            more: names of parameters that its first group holds besides.
        """
        named = dict(model.named_parameters())
        groups = [
            {**options, "params": [named[name] for name in (*names, *(() if place else more))]}
            for place, (options, names) in enumerate(zip(self.groups, self.names, strict=True))
        ]
        kind = getattr(torch.optim, self.kind)
        optimizer: torch.optim.Optimizer = kind(groups)
        for name, values in self.state.items():
            optimizer.state[named[name]] = {
                key: _placed(value, named[name], groups[0]) for key, value in values.items()
            }
        return optimizer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, *, others: bool = False) -> OptimizerState | None:
    """The optimizer as it is now, copied; None where it is not torch's own or steps what is not this model's.

    Args:
        model: whose parameters have names.
        optimizer: the plain one.
        others: leave out what is not this model's instead.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [
        {**group, "params": [p for p in group["params"] if not others or id(p) in names]}
        for group in optimizer.param_groups
    ]
    held = [p for group in groups for p in group["params"]]
    kind = type(optimizer)
    if getattr(torch.optim, kind.__name__, None) is not kind or any(id(p) not in names or is_shard(p) for p in held):
        return None
    state = {
        names[id(p)]: {key: _kept(value) for key, value in optimizer.state[p].items()}
        for p in held
        if p in optimizer.state
    }
    return OptimizerState(
        kind=kind.__name__,
        groups=tuple(_options(group) for group in groups),
        names=tuple(tuple(names[id(p)] for p in group["params"]) for group in groups),
        state=state,
    )


def rates_of(optimizer: torch.optim.Optimizer) -> tuple[Mapping[str, Any], ...]:
    """What of each group a scheduler may change; nothing here waits for a device."""
    return tuple(
        {key: group[key] for key in RATES if key in group and not isinstance(group[key], Tensor)}
        for group in optimizer.param_groups
    )


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}
    plain = (bool, int, float, str, tuple, type(None))
    return {key: value for key, value in options.items() if key != "params" and isinstance(value, plain)}


def _kept(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _placed(value: Any, parameter: Tensor, group: Mapping[str, Any]) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape and value.is_floating_point():
        return value.to(parameter.device, parameter.dtype, copy=True)
    # The step counter lives on the CPU but for kernels that count on the device.
    counts_there = bool(group.get("fused") or group.get("capturable"))
    return value.to(parameter.device if counts_there else "cpu", copy=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A loop from one step on.

    Attributes:
        start: the step before which parameters and optimizers were as kept.
        optimizers: as they were then, in the order in which they step.
        rates: by step, of each optimizer: see :func:`rates_of`.
        max_norm: what the loop clips the total gradient norm to, None where it does not.
        scaled: a GradScaler is at work.
        scale: what it multiplied the loss of the first step by, 1 without one.
        growth_interval: steps after which it doubles that.
        backoff: what it multiplies that by at a step that it skips, as it was seen where it skipped any.
        norms: by step, the total gradient norm that was read, before clipping.
        began: the loss that training began with, NaN where that was not read.
    """

    start: int
    optimizers: tuple[OptimizerState, ...]
    rates: Mapping[int, Sequence[Sequence[Mapping[str, Any]]]] = field(default_factory=dict)
    max_norm: float | None = None
    scaled: bool = False
    scale: float = 1.0
    growth_interval: int = 2000
    backoff: float = 0.5
    norms: Mapping[int, float] = field(default_factory=dict)
    began: float = math.nan

    @property
    def lr(self) -> float:
        """The largest learning rate of the last step."""
        steps = self.rates[max(self.rates)] if self.rates else [each.groups for each in self.optimizers]
        return max((float(group["lr"]) for groups in steps for group in groups if "lr" in group), default=0.0)

    def to_json(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """In JSON's types."""
        optimizers = []
        for index, each in enumerate(self.optimizers):
            state: dict[str, dict[str, Any]] = {}
            for name, values in each.state.items():
                state[name] = {key: _packed(value, f"{index}.{name}.{key}", tensors) for key, value in values.items()}
            names = [list(group) for group in each.names]
            optimizers.append({"kind": each.kind, "groups": jsonable(each.groups), "names": names, "state": state})
        return {
            **{name: jsonable(getattr(self, name)) for name in PLAIN},
            **{name: {str(step): jsonable(each) for step, each in getattr(self, name).items()} for name in BY_STEP},
            "optimizers": optimizers,
        }


def loop_from_json(written: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Loop:
    """The inverse of :meth:`Loop.to_json`."""
    return Loop(
        **{name: revived(written[name]) for name in PLAIN if name in written},
        optimizers=tuple(_state_from_json(each, tensors) for each in written["optimizers"]),
        rates={int(step): [_tuples(groups) for groups in rates] for step, rates in written["rates"].items()},
        norms={int(step): float(revived(norm)) for step, norm in written["norms"].items()},
    )


def _state_from_json(written: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> OptimizerState:
    kind = str(written["kind"])
    found = getattr(torch.optim, kind, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        message = f"torch.optim has no optimizer {kind}"
        raise TypeError(message)
    state = {
        name: {key: _unpacked(value, tensors) for key, value in values.items()}
        for name, values in written["state"].items()
    }
    names = tuple(tuple(group) for group in written["names"])
    return OptimizerState(kind=kind, groups=tuple(_tuples(written["groups"])), names=names, state=state)


def _packed(value: Any, key: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[key] = value.contiguous()
        return {"tensor": key}
    return {"value": jsonable(value)}


def _unpacked(value: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    return tensors[value["tensor"]] if "tensor" in value else revived(value["value"])


def _tuples(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no tuples, and an optimizer's betas are one."""
    return [{key: tuple(v) if isinstance(v, list) else revived(v) for key, v in group.items()} for group in groups]
