"""A training step that the watch caught, as something that can be run again: the kept steps, on a copy of the model.

It is a :class:`CellContext` whose training runs are the loop's own: its batches and random states, its optimizers as they were, its
clipping and loss scale. Experiments and remedies work on it as they do on a cell of the suite.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Cell, Subject
from numerics_suite.devices.arithmetic import autocast_off
from numerics_suite.devices.condition import dtype_of
from numerics_suite.devices.device import visible_accelerators
from numerics_suite.devices.precisions import PRECISIONS, Precision
from numerics_suite.diagnosis.consequences import NO_RUN
from numerics_suite.engine.calls import input_device
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.request import Request
from numerics_suite.engine.training_loop import HaltedError, Trainer, TrainingPlan
from numerics_suite.observations.finiteness import nonfinite_count
from numerics_suite.subjects import compat
from numerics_suite.subjects.load import Loaded, convert
from numerics_suite.training_watch.inputs import named_inputs
from numerics_suite.training_watch.norms import local
from numerics_suite.training_watch.optimizer_states import Loop
from numerics_suite.training_watch.patches import unheard
from numerics_suite.training_watch.ring import ForwardCall
from numerics_suite.training_watch.step_replay import StepReplay

LEAST_STEPS = 6
"""Steps that a cured copy takes, over the same batches again where there are fewer: what only puts off the bad value is seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a replay begins, and what was kept of the loop from there on.

    Attributes:
        words: `the snapshot from before step 3`.
        calls: forward passes, oldest first.
        loop: how it stepped, None where only forward and backward passes can be run again.
        scale: of the loss, where there is no loop that has its own.
        backward: False where the parameters are not those of the calls, so that only the forward pass goes wrong in the same place.
        parameters: what the model held there; empty for what it holds now.
        whole: every step up to the bad one is among the calls.
        unheld: parameters that are meant to train and that no optimizer of the loop holds.
    """

    words: str
    calls: Sequence[ForwardCall]
    loop: Loop | None = None
    scale: float = 1.0
    backward: bool = True
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    whole: bool = True
    unheld: tuple[str, ...] = ()

    @property
    def first(self) -> int:
        """The first step of the replay, 0 of no calls."""
        return self.calls[0].step if self.calls else 0

    @property
    def steps(self) -> int:
        """How many there are."""
        return len({call.step for call in self.calls})


class CaughtStep(CellContext):
    """The caught steps from one start on.

    Attributes:
        source: the watched model, left as it is.
        start: where the replay begins.
        uninitialised: parameters that nothing had initialised when the watch began.
        largest: bytes of parameters of which a copy is made.
    """

    takes_ids = False  # it runs on the batches that were kept; none is drawn

    def __init__(  # noqa: PLR0913 - keywords
        self,
        source: nn.Module,
        start: Start,
        *,
        uninitialised: Sequence[str] = (),
        largest: float = math.inf,
        cell: Cell | None = None,
        request: Request | None = None,
    ) -> None:
        """Nothing is copied until something runs."""
        self.source, self.start, self.uninitialised, self.largest = source, start, tuple(uninitialised), largest
        own, name = recipe_of(source, start), type(source).__name__
        subject = Subject(id=name, source=name, kind="factory", task="module", family="generic", model_class=name)
        device = str(input_device(source))
        home = Cell(subject=name, precision=own.name, attn=compat.attention_of(source), device=device, task="module")
        super().__init__(subject, cell or home, request or Request(plan=_plan(start)))
        self.as_caught = self.cell.precision == own.name
        self.recipe = own if self.as_caught else self.recipe
        self.first_step, self.origin, self.unheld = start.first, start.words, start.unheld

    def _like(self, subject: Subject, cell: Cell, request: Request) -> CellContext:  # noqa: ARG002 - there is one subject
        like = CaughtStep(
            self.source,
            self.start,
            uninitialised=self.uninitialised,
            largest=self.largest,
            cell=cell,
            request=request,
        )
        like.factor = self.factor
        return like

    def load(self, **_conditions: Any) -> Loaded:
        """A copy of the watched model as it was at the start, in the copy's own dtype, changed."""
        model = copied(self.source, self.start, self.largest)
        if not self.as_caught:
            convert(model, dtype_of(self.recipe.parameters))
        loaded = Loaded(
            model=model,
            batch=named_inputs(model, self.start.calls[-1]),
            missing=(),
            unexpected=(),
            mismatched=(),
            new_head=self.uninitialised,
            tied=(),
            attn=compat.attention_of(model),
            dtype=self.recipe.parameters,
        )
        for change in self.changes:
            loaded = change(loaded)
        return loaded

    @cached_property
    def unwritten(self) -> tuple[str, ...]:
        """Names of the parameters that are uninitialised still."""
        return tuple(name for name in self.uninitialised if nonfinite_count(self.model.get_parameter(name).detach()))

    @cached_property
    def once(self) -> TrainingPlan:
        """The steps once over, as they were."""
        return self.with_plan(steps=self.start.steps)

    @cached_property
    def factor(self) -> float:
        """What the loop multiplies its losses by before they go backward: read off the gradient norm of its first step.

        One that accumulates divides them by their number, or hands the number of tokens to the model, which then does. A mean over the
        step's losses is what is assumed; the norm that the watch read says how far off that is.
        """
        self.factor = 1.0
        loop = self.start.loop
        if loop is None or len(loop.optimizers) != 1 or not self.start.calls:
            return 1.0
        read, trainer = loop.norms.get(self.first_step, math.nan), self.trainer(self.once)
        # A step that ends in an error has no norm to be compared; what runs next says so.
        with contextlib.suppress(HaltedError, *NO_RUN):
            trainer.step(self.first_step)
        norm = trainer.norms[0] if trainer.norms else math.nan
        sound = math.isfinite(read) and math.isfinite(norm) and read > 0 and norm > 0
        return read / norm if sound else 1.0

    def trainer(self, plan: TrainingPlan, recipe: Precision | None = None) -> Trainer:  # noqa: ARG002 - the cell's own
        """The kept steps, still to be taken, on a copy."""
        return StepReplay(self, plan)


def _plan(start: Start) -> TrainingPlan:
    """How the loop trained; over its batches twice at least, where its optimizers can be stepped."""
    loop, count = start.loop, start.steps
    if loop is None:
        return TrainingPlan(steps=count, optimizer="sgd", lr=0.0)
    adaptive = any("eps" in group for each in loop.optimizers for group in each.groups)
    return TrainingPlan(
        steps=count * max(2, math.ceil(LEAST_STEPS / max(count, 1))),
        optimizer="adamw" if adaptive else "sgd",
        lr=loop.lr,
        max_grad_norm=loop.max_norm,
        init_scale=loop.scale if loop.scaled else None,
    )


def recipe_of(model: nn.Module, start: Start) -> Precision:
    """The recipe that the watched model was trained by: its dtype, its autocast sections, its loss scale."""
    dtype: Any = usual_dtype(model.parameters()) or "float32"
    # What is trained names the recipe: a float16 base under a float32 adapter is no training in float16.
    trained = usual_dtype(p for p in model.parameters() if p.requires_grad) or dtype
    sections = (str(dtype).removeprefix("torch.") for call in start.calls for dtype in call.autocast.values())
    autocast: Any = next(sections, None)
    scaled = start.loop is not None and start.loop.scaled
    return replace(
        PRECISIONS[precision_name(trained, autocast)], parameters=dtype, autocast=autocast, loss_scaling=scaled
    )


def usual_dtype(parameters: Iterable[Tensor]) -> str | None:
    """The dtype of most of the floating parameters, such as `float32`; None of none."""
    dtypes = [str(p.dtype).removeprefix("torch.") for p in parameters if p.is_floating_point()]
    return max(dict.fromkeys(dtypes), key=dtypes.count) if dtypes else None


def precision_name(dtype: str, autocast: str | None) -> str:
    """The precision of parameters of that dtype under that autocast."""
    trained = [recipe for recipe in PRECISIONS.values() if recipe.trains and not recipe.tf32]
    exact = [recipe.name for recipe in trained if (recipe.parameters, recipe.autocast) == (dtype, autocast)]
    # Parameters in half precision under autocast are no recipe: the section is what another precision would take away.
    alike = [recipe.name for recipe in trained if autocast is not None and recipe.autocast == autocast]
    return next(iter((*exact, *alike)), "fp32")


def copied(model: nn.Module, start: Start, largest: float = math.inf) -> nn.Module:
    """A copy of the model with the parameters of the start; one that was compiled in place runs as it is written.

    Args:
        model: left as it is.
        start: where the replay begins.
        largest: bytes of parameters of which a copy is made.

    Raises:
        NotApplicableError: it is larger, or cannot be copied.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if size > largest:
        reason = (
            f"not tried in the loop itself: the parameters take {size >> 20} MiB; numerics-suite check --bundle does"
        )
        raise NotApplicableError(reason)
    try:
        twin = copy.deepcopy(model)
    except Exception as error:
        reason = f"not tried: the model cannot be copied ({type(error).__name__})"
        raise NotApplicableError(reason) from error
    twin._compiled_call_impl = None  # noqa: SLF001 - what nn.Module.compile sets
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.grad = None
            if name in start.parameters:
                parameter.data = start.parameters[name].to(parameter.device, parameter.dtype, copy=True)
    return twin


def bad_parameters(model: nn.Module) -> tuple[str, ...]:
    """Names of the parameters with an element that is not finite."""
    return tuple(name for name, p in model.named_parameters() if nonfinite_count(local(p.detach())))


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Within it replays are as their calls were, wherever in a loop they run, and no watch takes them for training."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(unheard())
        stack.enter_context(torch.enable_grad())
        # Autocast forgets the weights that it has cast when its outermost section ends, and this is the outermost one: with its
        # cache on, every step of a replay would run with the weights of the first.
        stack.enter_context(autocast_off(*(kind for kind, _ in visible_accelerators()), keeps_casts=False))
        yield
