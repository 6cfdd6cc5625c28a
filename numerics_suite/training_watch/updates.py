"""Whether the steps of a watched loop reach its parameters: which get no gradient, which no optimizer holds, how much of a step is held.

It looks at the first steps and then as often as at the parameters. Which gradients are there costs no kernel; a step of parameters narrower than float32 is taken once
more in float64, on a sample: about ten small kernels a parameter, and none where parameters are in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from numerics_suite.engine.updates import NO_GRADIENT, HeldShare, UpdateMeter, held_share
from numerics_suite.training_watch.alarms import Alarm, Reading
from numerics_suite.training_watch.frozen_parameters import FROZEN, UNTIED, Frozen, untied
from numerics_suite.training_watch.norms import each_norm, floating, is_shard
from numerics_suite.training_watch.patches import unheard

FIRST = 3
"""Steps of each optimizer that are looked at from the start. One step may have met an odd batch, and a warm-up shows at the second."""

SAMPLE, ALTOGETHER = 4096, 1 << 16
"""Elements of each parameter whose step is taken again, and of all together where they are few.

To tell a share h from the unit roundoff u by three standard errors takes 9u/(u - h)² elements: 9/u = 2,304 in bfloat16 where none moves, 10,000 where half of that limit does.
So one head in half precision beside float32 adapters (`modules_to_save`) is looked at in more of its elements than each of many parameters.
"""

HELD, MEANT, FOURTH = "held of the steps", "steps squared", "fourth powers of the steps"
UNREACHED, UNHELD, ROUNDED, ZERO, DEAD = "unreached", "unheld", "rounded-update", "zero-gradient", "dead-gradient"
SILENT = frozenset({UNREACHED, UNHELD, ROUNDED, ZERO, DEAD, FROZEN, UNTIED})
"""Kinds of alarms in which every value is finite."""


@dataclass(slots=True)
class _OptimizerHistory:
    """What one optimizer did so far."""

    steps: int
    reached: set[int]
    """Parameters, by id, that had a gradient in one of its first steps."""
    norms: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)
    """Parameters, by id, and the norms of their gradients in these steps, on their device."""
    rate: float = 0.0
    rising: bool = True


class Updates:
    """Follows the optimizers of one watched model.

    Attributes:
        model: the plain one.
    """

    def __init__(self, model: nn.Module) -> None:
        """Nothing was seen yet."""
        self.model = model
        narrow = sum(p.requires_grad and p.dtype.itemsize < torch.float32.itemsize for p in model.parameters())
        self._meter = UpdateMeter(max(SAMPLE, ALTOGETHER // max(narrow, 1)), narrow=True)
        self._seen: dict[int, _OptimizerHistory] = {}
        self._metering: set[int] = set()
        self._frozen = Frozen(model)

    def before(self, optimizer: torch.optim.Optimizer, *, due: bool) -> None:
        """An optimizer is about to step; `due`: the parameters are looked at in this step."""
        seen = self._seen.setdefault(id(optimizer), _OptimizerHistory(steps=0, reached=set()))
        seen.steps += 1
        rate = max((float(g["lr"]) for g in optimizer.param_groups if isinstance(g.get("lr"), float)), default=0.0)
        self._frozen.before(optimizer)
        seen.rising, seen.rate = seen.steps == 1 or rate > seen.rate, rate
        if seen.steps <= FIRST:
            everything = (*self.model.parameters(), *_held_by(optimizer))
            seen.reached.update(id(p) for p in everything if p.grad is not None)
            seen.norms += _gradient_norms(_held_by(optimizer))
        if due or seen.steps <= FIRST:
            with unheard():
                self._meter.before(optimizer)
            self._metering.add(id(optimizer))

    def after(self, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
        """An optimizer has stepped: what to send for. Nothing while its rate still rises: a warm-up begins with steps that may be lost."""
        if id(optimizer) not in self._metering:
            return []
        self._metering.discard(id(optimizer))
        self._meter.after(optimizer)
        seen = self._seen[id(optimizer)]
        if seen.steps < FIRST or seen.rising:
            return []
        return [
            (f"{name} ({dtype})", value)
            for dtype, sums in self._meter.totals().items()
            for name, value in zip((HELD, MEANT, FOURTH), sums, strict=True)
        ]

    def left_out(
        self, step: int, optimizer: torch.optim.Optimizer, every: Sequence[torch.optim.Optimizer]
    ) -> Iterator[Alarm]:
        """The parameters that this step moved though they are frozen; after the optimizer's first steps, those that none of them trained."""
        seen = self._seen.get(id(optimizer))
        moved = self._frozen.moved(step)
        if moved is not None:
            yield moved
        if moved is not None or seen is None or seen.steps != FIRST:
            return
        named = {id(p): name for name, p in self.model.named_parameters() if p.requires_grad}
        own = _held_by(optimizer)
        strangers = [p for p in own if id(p) not in named and id(p) not in seen.reached]
        held = {id(p) for each in every for p in _held_by(each)}
        parameters = dict(self.model.named_parameters())
        # Made before peft or a freeze: whatever the optimizer holds gets no gradient, so its steps change nothing.
        idle = not any(id(p) in seen.reached for group in optimizer.param_groups for p in group["params"])
        unheld = [
            name
            for key, name in named.items()
            if key not in held
            and key in seen.reached
            and (idle or any(_same_kind(parameters[name], p) for p in strangers))
        ]
        if unheld:
            facts = {"parameters in no optimizer": len(unheld), "parameters of other tensors": len(strangers)}
            yield _unheld(step, unheld, facts, idle=idle)
            return
        without = tuple(named[id(p)] for p in own if id(p) in named and id(p) not in seen.reached)
        if without and len(without) < len(own):
            yield unreached(step, without, len(own))
        moving = {key for keys, norms in seen.norms for key, norm in zip(keys, norms.tolist(), strict=True) if norm}
        flat = tuple(named[id(p)] for p in own if id(p) in named and id(p) in seen.reached - moving)
        if flat and moving:
            yield zero_gradient(step, flat, len(own))
        if (loose := untied(step, self.model, held & seen.reached)) is not None:
            yield loose

    def rounded(self, reading: Reading, rate: float) -> Alarm | None:
        """The alarm of a reading whose steps are lost, None where they are held."""
        shares = list(_shares(reading))
        worst = max(shares, key=lambda share: share.roundoffs_lost, default=None)
        if worst is None or worst.roundoffs_lost <= 1:
            return None
        return Alarm(
            step=reading.step,
            kind=ROUNDED,
            bad=True,
            text=f"updates round away: the {worst.dtype} parameters hold {worst.share:.2g} of the steps at lr {rate:.2g}",
            cause="rounded-update",
            facts={**worst.facts, "learning rate": rate},
        )

    @property
    def rate(self) -> float:
        """The largest learning rate of the last steps."""
        return max((seen.rate for seen in self._seen.values()), default=0.0)


def _counted(count: int) -> str:
    return "1 parameter is" if count == 1 else f"{count} parameters are"


def _unheld(step: int, names: Sequence[str], facts: dict[str, int], *, idle: bool) -> Alarm:
    count = facts["parameters of other tensors"]
    other = (
        "nothing that the optimizer holds gets one"
        if idle and not count
        else f"{_counted(count)} of the optimizer not the model's"
    )
    return Alarm(
        step=step,
        kind=UNHELD,
        bad=True,
        text=f"{_counted(len(names))} of the model with a gradient in no optimizer, and {other}",
        cause="untrained-parameters",
        facts=dict(facts),
        parameters=tuple(names),
    )


def zero_gradient(step: int, names: Sequence[str], count: int) -> Alarm:
    """The alarm of parameters whose every gradient was exactly zero."""
    return Alarm(
        step=step,
        kind=ZERO,
        bad=True,
        text=f"{len(names)} of {count} parameters of the optimizer got a gradient of exactly zero in {FIRST} steps",
        cause="dead-gradient",
        facts={"exactly zero": len(names), "parameters of the optimizer": count},
        parameters=tuple(names),
    )


def dead(alarm: Alarm, names: Sequence[str], module: str | None) -> Alarm:
    """The alarm of parameters that the loss depends on and that get no gradient, or one of exactly zero."""
    what = "no gradient" if alarm.kind == UNREACHED else "a gradient of exactly zero"
    where = f", which ends in {module}" if module else ""
    counted = "without any gradient" if alarm.kind == UNREACHED else "exactly zero"
    facts = {counted: len(names), "parameters of the optimizer": alarm.facts["parameters of the optimizer"]}
    text = f"{len(names)} parameters that the loss depends on get {what}{where}"
    return replace(
        alarm,
        kind=DEAD,
        bad=True,
        cause="dead-gradient",
        text=text,
        facts=facts,
        parameters=tuple(names),
        module=module,
    )


def unreached(step: int, names: Sequence[str], count: int) -> Alarm:
    """The alarm of parameters that got no gradient."""
    return Alarm(
        step=step,
        kind=UNREACHED,
        bad=True,
        text=f"{len(names)} of {count} parameters of the optimizer got no gradient in {FIRST} steps",
        cause="untrained-parameters",
        facts={NO_GRADIENT: len(names), "parameters of the optimizer": count},
        parameters=tuple(names),
    )


def _shares(reading: Reading) -> list[HeldShare]:
    found = []
    for name, values in reading.values.items():
        if name.startswith(HELD):
            dtype = name.removeprefix(f"{HELD} (").removesuffix(")")
            sums = (values[-1], *(reading.values[f"{other} ({dtype})"][-1] for other in (MEANT, FOURTH)))
            found.append(held_share(dtype, *sums))
    return [share for share in found if share is not None]


@torch.no_grad()
def _gradient_norms(parameters: Sequence[Tensor]) -> list[tuple[tuple[int, ...], Tensor]]:
    """Of each device, the parameters by id and the norms of their gradients; a norm that underflows is asked again by a replay in float64."""
    whole = [p for p in parameters if p.grad is not None and not is_shard(p.grad) and floating([p.grad])]
    norms = each_norm(floating(p.grad for p in whole if p.grad is not None))
    groups: dict[torch.device, tuple[list[int], list[Tensor]]] = {}
    for parameter, norm in zip(whole, norms, strict=True):
        keys, found = groups.setdefault(norm.device, ([], []))
        keys.append(id(parameter))
        found.append(norm.float())
    return [(tuple(keys), torch.stack(found)) for keys, found in groups.values()]


def _held_by(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]


def _same_kind(one: Tensor, other: Tensor) -> bool:
    """Whether the one may be what became of the other: a copy, or another number of rows."""
    return one.dim() == other.dim() and one.shape[1:] == other.shape[1:] and (one.dim() > 1 or one.shape == other.shape)


def holds_copies(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether every parameter of the optimizer looks like one of the model's, is none of them, and has no gradient."""
    own, held = list(model.parameters()), _held_by(optimizer)
    kinds = [p for p in own if p.requires_grad and p.grad is not None]
    known = {id(p) for p in own}
    return (
        bool(held)
        and bool(kinds)
        and all(id(p) not in known and p.grad is None and any(_same_kind(p, other) for other in kinds) for p in held)
    )
