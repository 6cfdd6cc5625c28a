"""Runs the caught step again: python reproduce.py [CHECKPOINT | factory:MODULE:FUNCTION].

Ends with 1 where the finding is reproduced, with 0 where it does not, with 4 without a model, with 3 where it cannot be run. It needs torch,
safetensors and, for a model of theirs, transformers and peft. For a model of your own name a FUNCTION without arguments that returns it, or write build().
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.engine.kept_step import Kept, NoModelError, Steps, build, finite, norm_of

RISE, RISE_SHARE = math.log(2), 0.5
"""A loss counts as risen by a factor of 2 of the likelihood and half of where it began, whichever is more.

The first suits a loss in nats, the second any other. A batch that is harder, or a rate that is high at first, moves a
loss by tenths of a nat; what a loss of 2 that stays at 3 has lost is more than the first epochs of a usual fine-tuning gain."""


def least_rise(began: float) -> float:
    """Smallest rise that counts, given the initial loss.

    Args:
        began: mean loss before.
    """
    return max(RISE, RISE_SHARE * abs(began))


def not_finite(steps: Steps) -> tuple[bool, str]:
    """Whether a value is not finite, up to the bad step."""
    for number in steps.calls:
        bad = steps.passes(number)
        if steps.scaled and number < steps.kept.step:
            bad = [name for name in bad if "gradient" not in name]  # a GradScaler skips these
        if not bad and steps.optimizers:
            steps.update(number)
            bad = [f"{name} after step {number}" for name, p in steps.named.items() if not finite(p)]
            if not bad and not finite(norm_of(steps.named.values())):
                bad = [f"the norm of the parameters after step {number}"]
        if bad:
            more = f" and {len(bad) - 4} more" if bad[4:] else ""
            return True, f"not finite: {', '.join(bad[:4])}{more}"
    outside = (
        "; the loop computed its loss outside of the model, so only forward passes could be run"
        if steps.without_loss
        else ""
    )
    return False, f"every value is finite{outside}"


def skipped(steps: Steps) -> tuple[bool, str]:
    """Whether a GradScaler skips the kept steps."""
    count = 0
    for number in steps.calls:
        scale = steps.scale
        count += bool(steps.passes(number))
        steps.scale = scale
    text = (
        f"at a loss scale of {steps.scale:.4g} the gradients of {count} of {len(steps.calls)} kept steps are not finite"
    )
    return count == len(steps.calls) > 0, text


def no_gradient(steps: Steps) -> tuple[bool, str]:
    """Whether the named parameters get no gradient, or one of zeros, in any kept step, while others do."""
    reached: set[str] = set()
    for number in steps.calls:
        steps.passes(number)
        reached |= {name for name, p in steps.named.items() if p.grad is not None and bool(p.grad.any())}
        steps.update(number)
    named = steps.kept.finding["parameters"]
    flat = [name for name in named if name not in reached]
    text = f"{len(flat)} of the {len(named)} named parameters get no gradient, or one of zeros, in {len(steps.calls)} steps; {len(reached)} others get one"
    return bool(reached) and len(flat) == len(named) > 0, text


def unheld(steps: Steps) -> tuple[bool, str]:
    """Whether the named parameters get a gradient and no step moves them."""
    before = {name: p.detach().clone() for name, p in steps.named.items()}
    reached: set[str] = set()
    for number in steps.calls:
        steps.passes(number)
        reached |= {name for name, p in steps.named.items() if p.grad is not None}
        steps.update(number)
    named = steps.kept.finding["parameters"]
    still = [name for name in named if name in reached and torch.equal(before[name], steps.named[name])]
    text = f"{len(still)} of the {len(named)} named parameters get a gradient, and no optimizer of the loop moves them"
    return len(still) == len(named) > 0, text


def rounded(steps: Steps) -> tuple[bool, str]:
    """Whether the parameters hold less of the float64 steps than a unit roundoff of their dtype: the held part h of the steps s is ⟨h, s⟩/⟨s, s⟩."""
    dtype = getattr(torch, steps.kept.finding["evidence"]["dtype"])
    roundoff, held, meant = torch.finfo(dtype).eps / 2, 0.0, 0.0

    @contextlib.contextmanager
    def compared(optimizer: torch.optim.Optimizer) -> Iterator[None]:
        nonlocal held, meant
        before, moves = _in_float64(optimizer)
        yield
        for parameter, move in moves.items():
            if parameter.dtype == dtype:
                held += float(((parameter.detach().double() - before[parameter]) * move).sum())
                meant += float(move.square().sum())

    for number in steps.calls:
        steps.passes(number)
        steps.update(number, compared)
    share = held / meant if meant > 0 else math.nan
    return share < roundoff, f"the parameters hold {share:.2g} of the steps, and a unit roundoff is {roundoff:.2g}"


def _in_float64(optimizer: torch.optim.Optimizer) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
    """The parameters that are about to step, in float64, and by how much the same step moves them there."""
    usual = {"fused": None, "foreach": None, "capturable": False}
    before, twins, groups = {}, {}, []
    for group in optimizer.param_groups:
        held = [p for p in group["params"] if p.grad is not None]
        for parameter in held:
            before[parameter] = parameter.detach().double()
            twins[parameter] = before[parameter].clone()
            twins[parameter].grad = parameter.grad.double()
        groups.append({**group, **{k: v for k, v in usual.items() if k in group}, "params": [twins[p] for p in held]})
    kind: Any = type(optimizer)
    shadow = kind(groups)
    for parameter, twin in twins.items():
        state = optimizer.state.get(parameter, {})
        if state:
            shadow.state[twin] = {k: v.double() if isinstance(v, Tensor) and v.dim() else v for k, v in state.items()}
            shadow.state[twin] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in shadow.state[twin].items()}
    shadow.step()
    return before, {parameter: twin - before[parameter] for parameter, twin in twins.items()}


def moved(steps: Steps, *, every: bool = True) -> tuple[bool, str]:
    """Names of the given parameters that the kept steps move."""
    named = [name for name in steps.kept.finding["parameters"] if name in steps.named]
    before = {name: steps.named[name].detach().clone() for name in named}
    for number in steps.calls:
        steps.passes(number)
        steps.update(number)
    found = [name for name in named if not torch.equal(before[name], steps.named[name])]
    still = len(named) - len(found)
    text = f"{len(found)} of the {len(named)} named parameters move, and {still} stay as they are"
    return (bool(found) and not still) if every else (bool(found) and bool(still)), text


@torch.no_grad()
def _losses(steps: Steps) -> list[float]:
    return [float(steps.forward(call)["loss"]) for calls in steps.calls.values() for call in calls]


def risen(steps: Steps) -> tuple[bool, str]:
    """Whether the loop's own steps, over the kept batches, raise the loss on them."""
    before = _losses(steps)
    mean = math.fsum(before) / len(before)
    kept = list(steps.calls)
    for index in range(max(len(kept), steps.kept.step - kept[0] + 1)):  # as many as were taken from there on
        if steps.passes(kept[index % len(kept)]):
            return True, f"the loss on the kept batches was {mean:.4g}, and {index} steps later it is not finite"
        steps.update(kept[index % len(kept)])
    after = _losses(steps)
    now = math.fsum(after) / len(after)
    text = f"the loss on the kept batches is {mean:.4g} before their steps and {now:.4g} after them"
    return not now - mean < least_rise(mean), text


def bad_inputs(steps: Steps) -> tuple[bool, str]:
    """Whether the ids of the bad step are no integers, or name what the model does not have, so that it raises."""
    calls = steps.calls[steps.kept.step]
    values = [steps.value(v) for call in calls for v in (*call["args"], *call["kwargs"].values())]
    found = [value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    if found:
        return True, f"ids came as {found[0]}"
    try:
        for call in calls:
            steps.forward(call)
    except (IndexError, RuntimeError, ValueError) as error:
        return True, f"the model raises {type(error).__name__}: {' '.join(str(error).split())}"[:200]
    return False, "no input is floating, and the model takes them"


SHOWN: Mapping[str, Callable[[Steps], tuple[bool, str]]] = {
    **dict.fromkeys(("unreached", "zero-gradient", "dead-gradient"), no_gradient),
    **dict.fromkeys(("loss-scale", "loss-scale-halving"), skipped),
    "unheld": unheld,
    "rounded-update": rounded,
    "frozen": moved,
    "untied": functools.partial(moved, every=False),
    "loss-rose": risen,
    "inputs": bad_inputs,
}
"""Test that reproduces a finding, by its kind; all other kinds are reproduced by a non-finite value."""


def shown(kept: Kept, model: nn.Module) -> tuple[bool, str]:
    """Whether the finding is reproduced, and the measured quantity in words.

    Args:
        kept: what the folder holds.
        model: as :func:`build` made it; the steps change it.
    """
    steps = Steps(kept, model)
    if not steps.calls:
        return False, f"no batch of step {kept.step} was kept"
    return SHOWN.get(kept.told.get("alarm", ""), not_finite)(steps)


def main(arguments: Sequence[str]) -> int:
    """Run the folder that this file is in; the exit status."""
    kept = Kept(Path(__file__).resolve().parent)
    print(f"caught at step {kept.step}: {kept.finding['title']}")
    try:
        model = build(kept, arguments[0] if arguments else None)
    except NoModelError as error:
        print(f"{error}, or make it in build()", file=sys.stderr)
        return 4
    if arguments and not arguments[0].startswith("factory:"):
        kept.loop = None  # another model: its optimizer's states are not these
        model.train(bool(kept.model["training"]))
    again, text = shown(kept, model)
    print(f"{'' if again else 'not '}reproduced:\n{text}")
    return int(again)


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except Exception as error:  # noqa: BLE001 - Python would exit with 1, which means that the finding is reproduced
        traceback.print_exception(error)
        status = 3
    sys.exit(status)
