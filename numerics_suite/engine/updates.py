"""How much of the optimizer's steps the parameters keep, compared with the same steps in float64.

A parameter of p bits keeps only the part of a step that reaches its spacing. How much of all steps was held is the
projection of what the parameters gained, h, on the sum of the float64 steps, s: ⟨h, s⟩/⟨s, s⟩, over all elements. It is
1 where nothing rounds, does not depend on the number of steps, unlike the share of elements that moved.

**The limit** is the unit roundoff u of the parameters' dtype (2⁻⁸ in bfloat16, 2⁻¹¹ in float16). Rounding the whole sum once errs by up to u of it.
Where h is less than u of s, s + h and s are one number to that dtype: in its own terms the run equals one that did not
train. An element moves where a step reaches half its spacing, that is where it is smaller than about lr/u. Of weights
spread with σ around 0 these are a share of about 0.8 · lr/(u σ), so the limit is met at lr ≈ 1.25 u² σ: 2e-6 in
bfloat16 where σ is 0.1.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from numerics_suite.core.records import Fact
from numerics_suite.devices.device import has_float64
from numerics_suite.observations.roundoff import unit_roundoff

ELEMENTWISE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.SGD,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.Adadelta,
)
"""Optimizers that step each element independently, so that a sample of a parameter steps like the whole."""

SAMPLE, ALL_SAMPLES = (1 << 10, 1 << 14), 1 << 20
"""Elements of each parameter in the sample of a training run, least and most; and of all parameters together."""

DEVIATIONS = 3.0
"""Standard errors that are added to the share: a share that is small only by chance stays within the limit."""


NO_GRADIENT = "parameters without any gradient"
"""Fact of the watch that corresponds to the measurement `untrained` of `train.updates`."""

SHARE = "share of the steps that is held"
"""Name of the fact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldShare:
    """Share of the steps that the parameters of one dtype keep.

    Attributes:
        dtype: such as `bfloat16`.
        share: ⟨h, s⟩/⟨s, s⟩.
        error: its standard error over the sample. Each element keeps its step or not, with the weight w s², so the
            variance of the share is share · Σw²s⁴/(Σws²)²; the share in it is at least u, or a sample in which nothing
            moved would be certain.
    """

    dtype: str
    share: float
    error: float

    @property
    def facts(self) -> dict[str, Fact]:
        """Its facts in a finding."""
        return {SHARE: self.share, "its standard error": self.error, "dtype": self.dtype}

    @property
    def roundoffs_lost(self) -> float:
        """The unit roundoff over the share's upper bound: above 1, less than a unit roundoff of the steps is held."""
        upper = max(self.share, 0.0) + DEVIATIONS * self.error
        return unit_roundoff(getattr(torch, self.dtype)) / upper if upper > 0 else math.inf


def held_share(dtype: str, held: float, meant: float, fourth: float) -> HeldShare | None:
    """The share from three sums over elements; None if all steps are zero.

    Args:
        dtype: of the parameters.
        held: Σ w h s, with w the number of elements per sampled one.
        meant: Σ w s².
        fourth: Σ w² s⁴.
    """
    if not meant > 0:
        return None
    share = held / meant
    least = unit_roundoff(getattr(torch, dtype))
    return HeldShare(dtype=dtype, share=share, error=math.sqrt(max(share, least) * fourth) / meant)


def dtype_name(tensor: Tensor) -> str:
    """`bfloat16`."""
    return str(tensor.dtype).removeprefix("torch.")


class UpdateMeter:
    """Follows optimizers step by step; synchronises only if an optimizer counts its steps on the device.

    Attributes:
        first: by parameter, the sample before its first step.
        sums: by parameter, the float64 steps added up.
        largest: by parameter, the largest single step of each element.
        held: by parameter, its change over these steps.
    """

    def __init__(self, most: int = SAMPLE[1], *, narrow: bool = False) -> None:
        """Nothing was seen yet.

        Args:
            most: elements of each parameter that are looked at, evenly spaced.
            narrow: look at parameters narrower than float32 only.
        """
        self.most, self.narrow = most, narrow
        self.first: dict[int, Tensor] = {}
        self.sums: dict[int, Tensor] = {}
        self.largest: dict[int, Tensor] = {}
        self.held: dict[int, Tensor] = {}
        self._dtypes: dict[int, str] = {}
        self._weights: dict[int, float] = {}
        self._under_way: list[tuple[Tensor, Tensor, Tensor]] = []

    @torch.no_grad()
    def before(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Take the optimizer's next step on a sample in float64."""
        self._under_way = []
        if type(optimizer) not in ELEMENTWISE or getattr(optimizer, "grad_scale", None) is not None:
            return
        groups = []
        taken: list[tuple[Tensor, Tensor]] = []
        states: dict[Tensor, dict[str, Any]] = {}
        for group in optimizer.param_groups:
            twins = []
            for parameter in filter(self._looked_at, group["params"]):
                twin = self.sample(parameter)
                taken.append((parameter, twin.clone()))
                twin.grad = self.sample(parameter.grad)
                states[twin] = {key: self._state(v, parameter) for key, v in optimizer.state.get(parameter, {}).items()}
                twins.append(twin)
            if twins:
                groups.append({**_options(group), "params": twins})
        if groups:
            kind: Any = type(optimizer)
            shadow = kind(groups)
            shadow.state.update({twin: state for twin, state in states.items() if state})
            shadow.step()
            stepped = [twin for group in groups for twin in group["params"]]
            self._under_way = [(p, old, new - old) for (p, old), new in zip(taken, stepped, strict=True)]

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        """Record what the optimizer's step changed."""
        del optimizer
        for parameter, old, step in self._under_way:
            key, gained = id(parameter), self.sample(parameter) - old
            self._dtypes[key], self._weights[key] = dtype_name(parameter), parameter.numel() / old.numel()
            self.first.setdefault(key, old)
            self.sums[key] = self.sums[key] + step if key in self.sums else step
            self.largest[key] = torch.maximum(self.largest[key], step.abs()) if key in self.largest else step.abs()
            self.held[key] = self.held[key] + gained if key in self.held else gained
        self._under_way = []

    def _looked_at(self, parameter: Tensor) -> bool:
        gradient = parameter.grad
        if gradient is None or not parameter.is_floating_point() or gradient.layout is not torch.strided:
            return False
        whole = not hasattr(parameter, "_local_tensor") and parameter.numel() > 0 and has_float64(parameter.device)
        return whole and (not self.narrow or parameter.dtype.itemsize < torch.float32.itemsize)

    @classmethod
    def of(cls, parameters: int) -> UpdateMeter:
        """A meter for a training run of the suite.

        Args:
            parameters: how many tensors are trained.
        """
        return cls(min(SAMPLE[1], max(SAMPLE[0], ALL_SAMPLES // max(parameters, 1))))

    def sample(self, tensor: Tensor | None) -> Tensor:
        """At most that many evenly spaced elements, copied to float64."""
        assert tensor is not None
        flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
        return flat[:: max(1, -(-flat.numel() // self.most))].to(torch.float64, copy=True)

    def _state(self, value: Any, parameter: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        return self.sample(value) if value.shape == parameter.shape and value.dim() else value.detach().cpu().clone()

    def totals(self) -> dict[str, Tensor]:
        """By dtype narrower than float32, Σ w h s, Σ w s² and Σ w² s⁴ in float64, on the parameters' device.

        Each sampled element counts w times, so that small parameters, which are sampled whole, keep their weight.
        """
        found: dict[str, Tensor] = {}
        for key, total in self.sums.items():
            dtype = self._dtypes[key]
            if getattr(torch, dtype).itemsize >= torch.float32.itemsize:
                continue
            square, weight = total.square(), self._weights[key]
            moments = (
                (self.held[key] * total).sum() * weight,
                square.sum() * weight,
                square.square().sum() * weight**2,
            )
            sums = torch.stack(moments)
            found[dtype] = found[dtype] + sums.to(found[dtype].device) if dtype in found else sums
        return found

    def shares(self) -> tuple[HeldShare, ...]:
        """One share for each dtype narrower than float32; in wider ones the limit is too small to measure."""
        found = (held_share(dtype, *sums.tolist()) for dtype, sums in self.totals().items())
        return tuple(share for share in found if share is not None)

    def unmoved(self, parameters: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Names of the parameters that never changed although float64 moves an element by a whole spacing.

        This holds in one step and in total. Half a spacing would do if optimizers did not round as well.

        Args:
            parameters: by name, as they are now.
        """
        still = []
        for name, parameter in parameters.items():
            key = id(parameter)
            first = self.first.get(key)
            if first is None:
                continue
            limits = torch.finfo(parameter.dtype)
            spacing = (first.abs() * limits.eps).clamp(min=limits.smallest_normal * limits.eps)
            moves = (self.largest[key] >= spacing) & (self.sums[key].abs() >= spacing)
            if bool(moves.any()) and torch.equal(self.sample(parameter), first):
                still.append(name)
        return tuple(still)


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group's options for a step in plain torch on any device."""
    options = {key: float(value) if isinstance(value, Tensor) else value for key, value in group.items()}
    usual = {"fused": None, "foreach": None, "capturable": False, "differentiable": False}
    return {key: usual.get(key, value) for key, value in options.items() if key not in {"params", "param_names"}}


@contextlib.contextmanager
def metered(optimizers: Sequence[torch.optim.Optimizer], meter: UpdateMeter, rounding: str) -> Iterator[None]:
    """Let the meter follow the optimizers, and store their results by the given rounding.

    Args:
        optimizers: of a training run.
        meter: of that run.
        rounding: `nearest` as optimizers do; `master` steps a float32 copy, which the meter sees, and rounds it into
            the parameter; `stochastic` steps in float32 and rounds up or down at random, so that the mean is the step.
    """
    wide = None if rounding == "nearest" else _WideSteps(stochastic=rounding == "stochastic")
    handles = []
    for each in optimizers:
        pre: list[Any] = [meter.before]
        post: list[Any] = [meter.after]
        if wide is not None:  # the meter is within the float32 step of master weights, and around a stochastic one
            pre, post = ([wide.widen, *pre], [*post, wide.narrow])
            pre, post = (pre[::-1], post[::-1]) if rounding == "stochastic" else (pre, post)
        handles += [each.register_step_pre_hook(hook) for hook in pre]
        handles += [each.register_step_post_hook(hook) for hook in post]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _WideSteps:
    """Steps of parameters narrower than float32, taken in float32."""

    def __init__(self, *, stochastic: bool) -> None:
        self.stochastic = stochastic
        self.masters: dict[Tensor, Tensor] = {}
        self.dtypes: dict[Tensor, torch.dtype] = {}

    def widen(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for parameter in _stepped(optimizer):
            if parameter.dtype.itemsize >= torch.float32.itemsize:
                continue
            self.dtypes[parameter] = parameter.dtype
            gradient, parameter.grad = parameter.grad, None
            parameter.data = self.masters.get(parameter, parameter.data.float())
            parameter.grad = None if gradient is None else gradient.float()
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    state[key] = value.float()

    def narrow(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for parameter in _stepped(optimizer):
            dtype = self.dtypes.pop(parameter, None)
            if dtype is None:
                continue
            stepped, parameter.grad = parameter.data, None
            if self.stochastic:
                parameter.data = stochastically_rounded(stepped, dtype)
            else:
                self.masters[parameter] = stepped
                parameter.data = stepped.to(dtype)


def _stepped(optimizer: torch.optim.Optimizer) -> Iterable[Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"] if p.is_floating_point())


def stochastically_rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round each value to one of its two neighbours in the dtype at random, so that the mean is the value.

    Source: Gupta et al. 2015, "Deep Learning with Limited Numerical Precision".

    Args:
        values: float32.
        dtype: a narrower one.
    """
    near = values.to(dtype)
    rest = values - near.float()
    other = torch.nextafter(near, torch.where(rest > 0, torch.inf, -torch.inf).to(dtype))
    gap = (other.float() - near.float()).abs()
    up = torch.rand_like(values) * gap < rest.abs()
    return torch.where(up & (rest != 0), other, near)
