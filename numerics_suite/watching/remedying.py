"""The remedies of what the watch caught, tried: the kept steps are taken again with each, on a copy.

Nothing is verified without a replay: first the steps are taken as they were, and only where they go bad again does a remedy under which
they do not say anything. `verified` is True where they then stay finite, over and over, and the loss does not rise; False where they do
not; None where that cannot be had here, with the reason as the effect.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median_low

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError, UnsupportedError
from numerics_suite.core.records import Finding, Remedy
from numerics_suite.diagnosing.added import cost_of
from numerics_suite.diagnosing.cures import (
    SAFE_EPS,
    SCALES,
    hold_in_float32,
    initialise,
    learning_rates,
    worth_widening,
)
from numerics_suite.diagnosing.remedies import useful_first
from numerics_suite.diagnosing.trying import NOT_HERE
from numerics_suite.engine.training_loop import Plan
from numerics_suite.subjects import compat
from numerics_suite.watching.diagnose import Scene
from numerics_suite.watching.inputs import token_ids
from numerics_suite.watching.retraining import Condition, Replay, Run, Start, copied, factor_of, undisturbed
from numerics_suite.watching.ring import Call

LEAST_STEPS = 6
"""Steps that a cured copy takes, over the same batches again where there are fewer: what only puts off the bad value is seen."""

OF_INPUTS = "default-input-dtypes"
LOWER_RATE = "lower-learning-rate"
BEFORE_THE_STEP = frozenset({"clip-grad-norm", LOWER_RATE, "larger-optimizer-eps"})
"""Remedies that act when an optimizer steps: where the step's own passes go bad they must be tried on the steps before."""

EXACT_IN_HALF = 256
"""Whole numbers up to this are the same in bfloat16."""

Attempt = tuple[Condition, str]
Cure = Callable[["_Trial"], Iterator[Attempt]]


def with_remedies_tried(finding: Finding, scene: Scene) -> Finding:
    """The finding with each remedy tried that has not been, those that work first.

    Args:
        finding: of the watch.
        scene: what a replay needs; its model is left as it is.
    """
    with undisturbed():
        trial = _Trial(finding=finding, scene=scene)
        remedies = sorted(finding.remedies, key=lambda remedy: cost_of(remedy.name))
        tried = [trial.remedy(remedy) if remedy.verified is None else remedy for remedy in remedies]
    return replace(finding, remedies=useful_first(tried))


def left_untried(finding: Finding, reason: str) -> Finding:
    """The finding whose untried remedies say why.

    Args:
        finding: of the watch.
        reason: one clause.
    """
    told = [
        replace(remedy, effect=NOT_HERE.get(remedy.name, reason)) if _is_untried(remedy) else remedy
        for remedy in finding.remedies
    ]
    return replace(finding, remedies=tuple(told))


def _is_untried(remedy: Remedy) -> bool:
    return remedy.verified is None and (not remedy.effect or remedy.effect.startswith("not tried"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    works: bool
    effect: str


class _Trial:
    """One finding's remedies on one scene."""

    def __init__(self, *, finding: Finding, scene: Scene) -> None:
        self.finding, self.scene = finding, scene
        self._controls: list[tuple[Start, Run]] | None = None
        self._until = time.monotonic() + scene.seconds

    def remedy(self, untried: Remedy) -> Remedy:
        """One remedy, tried."""
        name = untried.name
        if name in NOT_HERE:
            return replace(untried, effect=NOT_HERE[name])
        if name != LOWER_RATE and name not in CURES:
            return replace(untried, effect="not tried: it is no matter of a training loop")
        try:
            if name != OF_INPUTS:
                self.controls()
            seen = self._lower_rate() if name == LOWER_RATE else self._first_that_works(name)
        except (NotApplicableError, UnsupportedError) as error:
            return replace(untried, effect=str(error))
        except Exception as error:  # noqa: BLE001 - a cure that cannot be tried never hides the finding
            line = " ".join(str(error).split())
            return replace(untried, effect=f"could not be tried: {type(error).__name__}: {line}"[:200])
        if seen is None:
            return replace(untried, effect="does not apply here")
        return replace(untried, verified=seen.works, effect=seen.effect)

    def _first_that_works(self, name: str) -> _Seen | None:
        last = None
        for condition, how in CURES[name](self):
            last = self._seen(self._start_for(name), condition, how)
            if last.works:
                return last
        return last

    def _lower_rate(self) -> _Seen:
        start = self._start_for(LOWER_RATE)
        assert start.kept.loop is not None
        lr = start.kept.loop.lr
        if not lr > 0:
            reason = "not tried: the loop's learning rate is 0"
            raise NotApplicableError(reason)

        def seen(plan: Plan) -> _Seen:
            return self._seen(start, Condition(lr_factor=plan.lr / lr), "")

        found = learning_rates(Plan(lr=lr), lambda plan: seen(plan).works)
        if found is None:
            return _Seen(works=False, effect=f"no learning rate from {lr:.2g} down to {lr / 1e4:.1g} helps")
        held = seen(Plan(lr=found))
        return replace(held, effect=f"lr {found:.2g} (was {lr:.2g}) is the largest that holds: {held.effect}")

    # --- where from ----------------------------------------------------------------------------------------------------

    def controls(self) -> list[tuple[Start, Run]]:
        """The starts from which the steps go bad again as they were, with what was seen.

        Raises:
            NotApplicableError: there is none, with the reason.
        """
        if self._controls is None:
            self._controls = list(self._found_controls())
        if not self._controls:
            raise NotApplicableError(self._why_not())
        return self._controls

    def _found_controls(self) -> Iterator[tuple[Start, Run]]:
        bad = self.finding.step or 0
        for given in self.scene.starts:
            start = replace(given, kept=replace(given.kept, factor=factor_of(self.copy(given), given.kept)))
            run = Replay(self.copy(start), start.kept).run()
            if run.bad_step is not None and run.bad_step <= max(bad, start.first):
                yield start, run

    def _why_not(self) -> str:
        if not self.scene.replay:
            return "not tried: the model is shared by processes, and a replay by one would wait for the others"
        if not self.scene.starts:
            return "not tried: no batch of that step is left to run again, or the parameters are no longer finite and no snapshot was kept (snapshot_every)"
        words = " or ".join(start.words for start in self.scene.starts)
        gap = "" if all(start.whole for start in self.scene.starts) else "; the ring lacks steps since then (ring)"
        return f"not tried: what was kept stays finite when it runs again, from {words}{gap}"

    def copy(self, start: Start) -> nn.Module:
        """The model as it was at the start."""
        return copied(self.scene.model, start, self.scene.largest_copy)

    def _start_for(self, name: str) -> Start:
        """Where a remedy's replay begins: the first control that it can act on.

        Raises:
            NotApplicableError: there is none, with the reason.
        """
        if name == OF_INPUTS:  # a model that takes such ids at all goes on quietly: what is wrong is the call
            return self.scene.starts[0] if self.scene.starts else self.controls()[0][0]
        for start, control in self.controls():
            acts = control.after_update or start.first < (control.bad_step or 0)
            if name not in BEFORE_THE_STEP or (start.kept.loop is not None and acts):
                return start
        if all(start.kept.loop is None for start, _ in self.controls()):
            reason = "not tried: it acts when the optimizer steps, and only the forward pass, or forward and backward, can be run again"
        else:
            reason = f"not tried: it acts on the steps before step {self.finding.step}, and no snapshot from before them was kept (snapshot_every)"
        raise NotApplicableError(reason)

    # --- what is seen --------------------------------------------------------------------------------------------------

    def _seen(self, start: Start, condition: Condition, how: str) -> _Seen:
        """The steps under the condition, as many times over as there are to take.

        Raises:
            NotApplicableError: the time is over.
        """
        if time.monotonic() >= self._until:
            reason = f"not tried: the {self.scene.seconds:g} seconds for it were over; numerics-suite check --bundle has no such limit"
            raise NotApplicableError(reason)
        replay = Replay(self.copy(start), start.kept, condition)
        count = len(replay.calls)
        steps = start.kept.loop is not None and start.kept.backward
        run = replay.run(passes=max(2, math.ceil(LEAST_STEPS / count)) if steps else 1, look_first=steps)
        works, effect = _told(run, count, start, self._precision(condition))
        return _Seen(works=works, effect=f"{how}: {effect}" if how else effect)

    def _precision(self, condition: Condition) -> float:
        """Unit roundoff of the coarsest dtype that the loss goes through."""
        calls = [call for start in self.scene.starts for call in start.kept.calls]
        autocast = [call.autocast for call in calls] if condition.autocast is None else [condition.autocast]
        dtypes = {dtype for each in autocast for dtype in each.values()}
        dtypes |= {p.dtype for p in self.scene.model.parameters() if p.is_floating_point()}
        return max((torch.finfo(dtype).eps / 2 for dtype in dtypes), default=torch.finfo(torch.float32).eps / 2)


def _told(run: Run, count: int, start: Start, roundoff: float) -> tuple[bool, str]:
    """Whether that is a cure, and what was seen.

    Args:
        run: under the remedy.
        count: steps of one pass over the batches.
        start: where it began.
        roundoff: of the coarsest dtype.
    """
    if run.bad_step is not None:
        return False, f"still fails: {run.bad} at step {run.bad_step}"
    if run.steps and run.skipped == run.steps:
        return False, f"still fails: the GradScaler skips all of {run.steps} steps"
    if start.kept.loop is None or not run.before or not run.steps:
        passes = "forward and backward pass" if run.losses and start.kept.backward else "forward pass"
        return True, f"finite: {passes} of step {start.kept.calls[-1].step}, with {start.words}"
    # The same batches, with the parameters of the start and with the last ones.
    first, last = _mean(run.before), _mean(run.losses[-count:])
    seen = f"loss {first:.3g} → {last:.3g} in {run.steps} steps, with {start.words}"
    # Eight roundoffs of it, as train.descends allows.
    if not last <= first + 8 * roundoff * max(abs(first), 1.0):
        return False, f"finite, and hides the symptom only: {seen}"
    typical, began = median_low(run.losses[-count:]), start.kept.loop.began
    if typical > began + 8 * roundoff * max(abs(began), 1.0):
        return False, f"finite, and the loss stays above the {began:.3g} that training began with: {seen}"
    return True, f"finite; {seen}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


# --- the cures ---------------------------------------------------------------------------------------------------------


def _init_head(trial: _Trial) -> Iterator[Attempt]:
    known = dict(trial.scene.model.named_parameters())
    names = [name for name in trial.scene.initially_bad or trial.finding.parameters if name in known]
    if names:
        yield Condition(change=lambda model: initialise(model, names)), ""


def _clip(trial: _Trial) -> Iterator[Attempt]:
    loops = [start.kept.loop for start, _ in trial.controls() if start.kept.loop is not None]
    if any(loop.max_norm is not None and loop.max_norm <= 1.0 for loop in loops):
        reason = f"does not apply: the loop clips the gradient norm to {loops[0].max_norm:g} already"
        raise NotApplicableError(reason)
    yield Condition(max_norm=1.0), ""


def _larger_eps(trial: _Trial) -> Iterator[Attempt]:
    loops = [start.kept.loop for start, _ in trial.controls() if start.kept.loop is not None]
    if any("eps" in group for loop in loops for each in loop.optimizers for group in each.groups):
        yield Condition(eps=SAFE_EPS), f"eps {SAFE_EPS:g}"


def _loss_scale(trial: _Trial) -> Iterator[Attempt]:
    if trial.scene.scale != 1 or any(
        start.kept.loop is not None and start.kept.loop.scaled for start in trial.scene.starts
    ):
        for scale in SCALES:
            yield Condition(scale=scale), f"scale {scale:g}"


def _widened(model: nn.Module) -> None:
    model.float()


def _amp_bf16(trial: _Trial) -> Iterator[Attempt]:
    """Where float16 is at work: bfloat16 has float32's range, and no more than that."""
    narrow = any(p.dtype is torch.float16 for p in trial.scene.model.parameters())
    calls = [call for start in trial.scene.starts for call in start.kept.calls]
    if narrow or any(torch.float16 in call.autocast.values() for call in calls):
        kind = next((p.device.type for p in trial.scene.model.parameters()), "cpu")
        yield Condition(change=_widened, autocast={kind: torch.bfloat16}, scale=0), "float32, autocast to bfloat16"


def _without_amp(trial: _Trial) -> Iterator[Attempt]:
    if any(call.autocast for start in trial.scene.starts for call in start.kept.calls):
        yield Condition(change=_widened, autocast={}, scale=0), "in fp32"


def _keep_in_fp32(trial: _Trial) -> Iterator[Attempt]:
    if trial.finding.module is None:
        reason = "not tried: no module was named to keep in float32"
        raise NotApplicableError(reason)
    for names, how in worth_widening(trial.scene.model, trial.finding.module):

        def change(model: nn.Module, names: tuple[str, ...] = names) -> None:
            for name in names:
                hold_in_float32(model.get_submodule(name))

        yield Condition(change=change), how


def _attention(name: str) -> Cure:
    def cure(trial: _Trial) -> Iterator[Attempt]:
        if compat.is_language_model(trial.scene.model) and compat.attention_of(trial.scene.model) != name:
            yield Condition(change=lambda model: compat.set_attention(model, name)), ""

    return cure


def _other_side(_: _Trial) -> Iterator[Attempt]:
    """Every row with its padding on one side: behind the tokens no query is left without a key."""
    for side in ("right", "left"):
        yield Condition(inputs=lambda call, side=side: _padded(call, side)), f"padding on the {side}"  # type: ignore[misc]


def _padded(call: Call, side: str) -> Call:
    mask = call.kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        reason = "not tried: the batch has no mask of rows and columns"
        raise NotApplicableError(reason)
    order = torch.argsort((mask == 0).int() if side == "right" else (mask != 0).int(), dim=1, stable=True)

    def moved(value: object) -> object:
        return value.gather(1, order) if isinstance(value, Tensor) and value.shape == mask.shape else value

    return replace(call, kwargs={name: moved(value) for name, value in call.kwargs.items()})


def _default_dtypes(trial: _Trial) -> Iterator[Attempt]:
    lost = False

    def whole(call: Call) -> Call:
        named = dict(token_ids(trial.scene.model, call.args, call.kwargs))
        args = tuple(value.long() if any(value is ids for ids in named.values()) else value for value in call.args)
        return replace(call, args=args, kwargs={n: v.long() if n in named else v for n, v in call.kwargs.items()})

    for call in trial.scene.calls:
        for _, ids in token_ids(trial.scene.model, call.args, call.kwargs):
            narrow = ids.dtype in {torch.bfloat16, torch.float16}
            lost = lost or (narrow and bool((ids > EXACT_IN_HALF).any()))
    if lost:
        reason = "cannot be tried: the ids were rounded before they came here, and which were meant is lost"
        raise NotApplicableError(reason)
    yield Condition(inputs=whole), "ids in int64"


CURES: dict[str, Cure] = {
    "init-head": _init_head,
    OF_INPUTS: _default_dtypes,
    "fix-padding": _other_side,
    "clip-grad-norm": _clip,
    "larger-optimizer-eps": _larger_eps,
    "tune-loss-scale": _loss_scale,
    "eager-attention": _attention("eager"),
    "sdpa-attention": _attention("sdpa"),
    "use-amp-bf16": _amp_bf16,
    "keep-in-fp32": _keep_in_fp32,
    "disable-amp": _without_amp,
}
"""By remedy, conditions under which the kept steps are taken again, cheapest first; a learning rate is searched for instead."""
