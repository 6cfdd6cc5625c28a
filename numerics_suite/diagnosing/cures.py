"""Each remedy of the contract as a change that is made to a fresh copy: evidence under cured conditions.

A cure yields attempts, cheapest for the user first; the first that works is the one that is told. It raises NotApplicableError where
the reason why it cannot be tried is worth telling. A remedy without an entry here cannot be tried on this machine (`reload-weights`
needs another copy of the files).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from numerics_suite.core.records import Finding
from numerics_suite.devices import random_state
from numerics_suite.devices.arithmetic import autocast_off
from numerics_suite.devices.precisions import PRECISIONS
from numerics_suite.diagnosing.fixing import fixed_configs
from numerics_suite.engine.calls import input_device
from numerics_suite.engine.evidence import Evidence
from numerics_suite.engine.training_loop import Plan
from numerics_suite.subjects.load import Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One way to apply a remedy.

    Attributes:
        evidence: the cell, cured.
        how: what was set, for the effect's text (`lr 1.2e-05`); empty where the remedy's name says it all.
        meant: the same model whose answers are held to another definition than its own files', None for the same. Such an
            attempt says what the definition is, so it is verified only where the definition was asked and agrees.
    """

    evidence: Evidence
    how: str = ""
    meant: Evidence | None = None


Change = Callable[[Loaded], Loaded]
Cure = Callable[[Evidence, Finding], Iterator[Attempt]]

SCALES = (2.0**12, 2.0**8, 2.0**4, 1.0, 2.0**20, 2.0**24)
"""Loss scales tried beside torch's 65,536: lower ones where gradients overflow, then higher ones where they vanish."""

SAFE_EPS = 1e-4
"""An eps that float16 holds (its smallest normal number is 6e-5) and whose square root of v it still outweighs."""


def initialise_head(loaded: Loaded) -> Loaded:
    """Xavier-uniform weights and zero biases for every parameter of a new head.

    Source: Glorot & Bengio 2010; the cure that GLM-4's users found for heads that nobody initialised.
    """
    initialise(loaded.model, loaded.new_head)
    return loaded


def initialise(model: nn.Module, names: Iterable[str]) -> None:
    """As :func:`initialise_head`, of any parameters, in place.

    Args:
        model: that has them.
        names: dotted.
    """
    with random_state.torch_seeded(0), torch.no_grad():
        for name in names:
            parameter = model.get_parameter(name)
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)


def _init_head(evidence: Evidence, _: Finding) -> Iterator[Attempt]:
    if evidence.loaded.new_head:
        yield Attempt(evidence=evidence.variant(change=initialise_head))


def _clip(evidence: Evidence, _: Finding) -> Iterator[Attempt]:
    plan = evidence.with_plan(max_grad_norm=1.0)
    if plan != evidence.request.plan:
        yield Attempt(evidence=evidence.variant(plan=plan))


def _larger_eps(evidence: Evidence, _: Finding) -> Iterator[Attempt]:
    if evidence.request.plan.optimizer != "sgd":
        yield Attempt(evidence=evidence.variant(plan=evidence.with_plan(eps=SAFE_EPS)), how=f"eps {SAFE_EPS:g}")


def _loss_scale(evidence: Evidence, _: Finding) -> Iterator[Attempt]:
    if evidence.recipe.loss_scaling:
        for scale in SCALES:
            yield Attempt(evidence=evidence.variant(plan=evidence.with_plan(init_scale=scale)), how=f"scale {scale:g}")


def _amp_bf16(evidence: Evidence, _: Finding) -> Iterator[Attempt]:
    if evidence.cell.precision != "amp-bf16":
        yield Attempt(evidence=evidence.variant(precision_name="amp-bf16"), how="in amp-bf16")


def _without_amp(evidence: Evidence, _: Finding) -> Iterator[Attempt]:
    if PRECISIONS[evidence.cell.precision].autocast is not None:
        yield Attempt(evidence=evidence.variant(precision_name="fp32"), how="in fp32")


def _attention(name: str) -> Cure:
    def cure(evidence: Evidence, _: Finding) -> Iterator[Attempt]:
        if evidence.subject.task != "module" and name != evidence.loaded.attn:
            yield Attempt(evidence=evidence.variant(attn=name))

    return cure


def _keep_in_fp32(evidence: Evidence, finding: Finding) -> Iterator[Attempt]:
    """The module of the finding, its likes in the other blocks, then those that hold it.

    A value that leaves the range in one block mostly does in the next, and one that a module hands on is out of range
    one level up.
    """
    if evidence.recipe.computes_in == "float64" or finding.module is None:
        return
    for names, how in worth_widening(evidence.model, finding.module):
        yield Attempt(evidence=evidence.variant(change=in_float32(*names)), how=how)


def worth_widening(model: nn.Module, module: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The module, its likes in the other blocks, then those that hold it: names, and the same in words.

    Args:
        model: that has it.
        module: dotted.
    """
    known = dict(model.named_modules())
    name = module
    while name:
        # A list of modules is never called itself, so nothing would cast what goes into its members.
        if name in known and not isinstance(known[name], (nn.ModuleList, nn.ModuleDict)):
            yield (name,), f"{name} in float32"
            leaf = name.rpartition(".")[2]
            alike = tuple(
                other
                for other, each in known.items()
                if type(each) is type(known[name]) and other.rpartition(".")[2] == leaf
            )
            if len(alike) > 1 and not leaf.isdigit():
                yield alike, f"every {leaf} ({len(alike)}) in float32"
        name = name.rpartition(".")[0]


def in_float32(*names: str) -> Change:
    """Hold modules in float32, autocast off within them; their outputs go back to the dtype that came in.

    Args:
        names: dotted.
    """

    def change(loaded: Loaded) -> Loaded:
        for name in names:
            hold_in_float32(loaded.model.get_submodule(name))
        return loaded

    return change


def hold_in_float32(module: nn.Module) -> None:
    """As :func:`in_float32`, of one module in place.

    Args:
        module: of any kind.
    """
    held = next((parameter.dtype for parameter in module.parameters()), None)
    module.float()
    # A class of its own, not a function set on the instance: that one would run the original's weights in a copy.
    kind = type(module)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        came_in = next((leaf.dtype for leaf in _floats((args, kwargs))), held)
        with autocast_off(input_device(self)):
            output = kind.forward(self, *_cast(args, torch.float32), **_cast(kwargs, torch.float32))
        return output if came_in is None else _cast(output, came_in)

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _floats(value: Any) -> Iterator[Tensor]:
    from torch.utils._pytree import tree_leaves

    return (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point())


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, value
    )


def _pad_token(evidence: Evidence, _: Finding) -> Iterator[Attempt]:
    if not evidence.takes_ids or getattr(evidence.model.config, "pad_token_id", None) is not None:
        return
    pad = evidence.space.pad_id

    def change(loaded: Loaded) -> Loaded:
        loaded.model.config.pad_token_id = pad  # type: ignore[union-attr]
        return loaded

    yield Attempt(evidence=evidence.variant(change=change), how=f"pad_token_id {pad}")


def _one_side(evidence: Evidence, _: Finding) -> Iterator[Attempt]:
    if len(evidence.family.padding_sides) < 2:
        return
    for side in evidence.family.padding_sides:
        variant = evidence.variant()
        variant.family = replace(evidence.family, padding_sides=(side,))
        yield Attempt(evidence=variant, how=f"padding on the {side} only")


def _default_dtypes(evidence: Evidence, _: Finding) -> Iterator[Attempt]:
    """Nothing is changed: the suite's own batches are int64, so what is asked of them is the cure."""
    if evidence.takes_ids:
        yield Attempt(evidence=evidence.variant(), how="ids and masks in int64")


def _config(evidence: Evidence, finding: Finding) -> Iterator[Attempt]:
    for fixed in fixed_configs(evidence, finding):
        yield Attempt(evidence=fixed.evidence, how=fixed.how, meant=fixed.meant)


CURES: dict[str, Cure] = {
    "init-head": _init_head,
    "default-input-dtypes": _default_dtypes,
    "set-pad-token": _pad_token,
    "fix-padding": _one_side,
    "fix-config": _config,
    "clip-grad-norm": _clip,
    "larger-optimizer-eps": _larger_eps,
    "tune-loss-scale": _loss_scale,
    "eager-attention": _attention("eager"),
    "sdpa-attention": _attention("sdpa"),
    "use-amp-bf16": _amp_bf16,
    "keep-in-fp32": _keep_in_fp32,
    "disable-amp": _without_amp,
}
"""By remedy, in the order of what they cost the user: a line of code, a setting, speed, memory."""

COST = (
    *("init-head", "default-input-dtypes", "set-pad-token", "fix-padding", "fix-config", "clip-grad-norm"),
    *("larger-optimizer-eps", "tune-loss-scale", "lower-learning-rate", "eager-attention", "sdpa-attention"),
    *("use-amp-bf16", "keep-in-fp32", "disable-amp", "reload-weights", "newer-version", "pin-version"),
)
"""Every remedy of the contract, cheapest for the user first."""

DECADES = 4
BISECTIONS = 3


def learning_rates(plan: Plan, holds: Callable[[Plan], bool]) -> float | None:
    """The largest stable learning rate at or below the plan's, to within a factor of 1.4; None without one.

    Args:
        plan: as asked.
        holds: trains with a plan and says whether that is stable.
    """
    good, bad = None, plan.lr
    for decade in range(1, DECADES + 1):
        lr = plan.lr / 10**decade
        if holds(replace(plan, lr=lr)):
            good = lr
            break
        bad = lr
    if good is None:
        return None
    return between_rates(plan, good, bad, holds)


def between_rates(plan: Plan, good: float, bad: float, holds: Callable[[Plan], bool]) -> float:
    """The largest learning rate that holds, by bisection of the logarithm.

    Args:
        plan: of everything else.
        good: a rate that holds.
        bad: one that does not, a decade away at most.
        holds: trains with a plan and says whether that is stable.
    """
    for _ in range(BISECTIONS):
        middle = math.sqrt(good * bad)
        good, bad = (middle, bad) if holds(replace(plan, lr=middle)) else (good, middle)
    return good
