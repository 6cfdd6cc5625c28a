"""The gradients that reach the optimizer in one step of the installed `transformers.Trainer`, in true float64.

Model, rows and arguments are ours; everything in between is the installed code: the sampler, the collator, the count
of labels, the loss that is chosen, its scaling, accelerate's backward pass, clipping. The optimizer takes no step; it
records the gradients it receives.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from numerics_suite.core.garbage import living_set_aside
from numerics_suite.devices import random_state
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.dropout import WithoutDropout
from numerics_suite.engine.router_loss import without_router_loss
from numerics_suite.engine.true_fp64 import true_fp64
from numerics_suite.subjects.quiet import quiet_transformers

Row = Mapping[str, Any]
Gradients = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What one optimizer step of the Trainer did.

    Attributes:
        gradients: by parameter, as the optimizer gets them.
        handed: the `num_items_in_batch` of each call of the model, None where the Trainer did not pass it.
        left_out: what was not computed in float64; the step is meaningful only if this is empty.
        lines: `file.py:123` of each line outside of torch that made a scalar that can be differentiated, in order.
        divided: the number by which accelerate divides each loss, in addition to the Trainer.
    """

    gradients: Gradients
    handed: tuple[float | None, ...]
    left_out: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    divided: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How the Trainer takes its step.

    Attributes:
        micro_batches: number of micro-batches of equal size.
        arguments: of `TrainingArguments`.
        collator: None for transformers' default one.
    """

    micro_batches: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)
    collator: Callable[[Any], Any] | None = None


class _Keeps(torch.optim.SGD):
    """An optimizer that records the gradients it receives and takes no step."""

    handed: dict[int, Tensor]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # noqa: ARG002
        """Take each parameter's gradient away, which would be zeroed next."""
        self.handed = {}
        for each in (parameter for group in self.param_groups for parameter in group["params"]):
            if each.grad is not None:
                self.handed[id(each)], each.grad = each.grad.detach(), None


class _LossLines(TorchFunctionMode):
    """Records the lines that make differentiable scalars: the last of them is the loss.

    Args:
        owner: object whose method's line is recorded; without one, the innermost line that is neither torch's nor ours.
    """

    def __init__(self, owner: object = None) -> None:
        """Nothing seen yet."""
        super().__init__()
        self.owner, self.lines = owner, dict[str, None]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func` and look at its result."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() == 0 and result.requires_grad and result.is_floating_point():
            self._note()
        return result

    def _note(self) -> None:
        frame = sys._getframe(2)  # noqa: SLF001 - the only way to the line that runs
        while frame is not None:
            file = frame.f_code.co_filename
            if file.startswith(_NOT_THE_STACK):
                wanted = False
            else:
                wanted = self.owner is None or frame.f_locals.get("self") is self.owner
            if wanted:
                self.lines[f"{Path(file).name}:{frame.f_lineno}"] = None
                return
            frame = frame.f_back  # type: ignore[assignment]


_NOT_THE_STACK = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")


def trainer_step(model: nn.Module, rows: Sequence[Row], way: Way) -> Step:
    """Let the installed Trainer take one optimizer step over all rows, in true float64 on the CPU and without dropout.

    Args:
        model: a `PreTrainedModel`, or peft's around one, on the CPU; left as it was.
        rows: of the whole batch.
        way: how.
    """
    from transformers import Trainer, TrainingArguments  # heavy

    handed: list[float | None] = []

    def note(_module: nn.Module, _args: Any, words: Mapping[str, Any]) -> None:
        items = words.get("num_items_in_batch")
        handed.append(None if items is None else float(items))

    with _process_kept(), tempfile.TemporaryDirectory() as folder, _float64(model) as session:
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            max_steps=1,
            per_device_train_batch_size=len(rows) // way.micro_batches,
            gradient_accumulation_steps=way.micro_batches,
            **{**_QUIET, **way.arguments},
        )
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = _Keeps(list(trained.values()), lr=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _step: 1.0)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=list(rows),
            data_collator=way.collator,
            optimizers=(optimizer, schedule),
        )
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ != "DefaultFlowCallback":
                trainer.remove_callback(callback)  # they print
        model.register_forward_pre_hook(note, with_kwargs=True)  # `preserved` takes it away
        with _LossLines() as seen:
            trainer.train()
        found = {name: optimizer.handed[id(each)] for name, each in trained.items() if id(each) in optimizer.handed}
        left_out = _computed(session.left_out)
        divided = int(trainer.accelerator.gradient_accumulation_steps)
        return Step(gradients=found, handed=tuple(handed), left_out=left_out, lines=tuple(seen.lines), divided=divided)


def accelerate_step(model: nn.Module, rows: Sequence[Row], shares: Sequence[float]) -> Step:
    """One optimizer step of a plain loop over accelerate, in true float64 and without dropout: a row in each micro-batch.

    Args:
        model: see :func:`trainer_step`.
        rows: of the whole batch.
        shares: of each row in the mean over all labels that count.
    """
    from accelerate import Accelerator  # heavy

    with _process_kept(), _float64(model) as session:
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        keeps = _Keeps(list(trained.values()), lr=0.0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=len(rows))
        prepared, optimizer = accelerator.prepare(model.train(), keeps)
        for row, share in zip(rows, shares, strict=True):
            tensors = {name: value[None] for name, value in row.items()}
            with accelerator.accumulate(prepared):
                loss = call_model(prepared, tensors)["loss"]
                accelerator.backward(loss * share * len(rows))  # accelerate divides by the number of micro-batches
                optimizer.step()
                optimizer.zero_grad()
        found = {name: keeps.handed[id(each)] for name, each in trained.items() if id(each) in keeps.handed}
        return Step(gradients=found, handed=(), left_out=_computed(session.left_out))


_QUIET: Mapping[str, Any] = {
    "max_grad_norm": 0.0,
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
}
"""No clipping unless a `Way` sets it, and no output."""


def whole_gradient(
    model: nn.Module, tensors: Mapping[str, Tensor], loss_of: Callable[[Any], Tensor], **words: Any
) -> Step:
    """The gradient of one loss of one call over the whole batch, under the same conditions and without the Trainer.

    Args:
        model: see :func:`trainer_step`.
        tensors: of the batch.
        loss_of: the loss of the model's output.
        words: more keywords of the call.
    """
    with _float64(model) as session:
        model.train()
        loss_of(call_model(model, tensors, **words)).backward()  # type: ignore[no-untyped-call]
        return Step(gradients=session.gradients(), handed=(), left_out=_computed(session.left_out))


def loss_with(model: nn.Module, tensors: Mapping[str, Tensor], **words: Any) -> tuple[float, str | None]:
    """The loss that the model itself returns, in true float64, and the line of its `forward` that made it.

    Args:
        model: see :func:`trainer_step`; the plain one.
        tensors: of the batch.
        words: more keywords of the call, such as `num_items_in_batch`.
    """
    with _float64(model), _LossLines(model) as seen:
        model.train()
        loss = call_model(model, tensors, **words)["loss"]
    return float(loss.detach()), next(reversed(seen.lines), None)


def _computed(left_out: Sequence[str]) -> tuple[str, ...]:
    """Those left-out ops that compute; torch's optimizers also call ops that mark steps for the profiler."""
    return tuple(each for each in left_out if "profiler." not in each)


@contextmanager
def _float64(model: nn.Module) -> Iterator[Any]:
    """True float64 without dropout and without a router's loss."""
    with without_router_loss(model), true_fp64(model) as session, WithoutDropout():
        yield session


@contextmanager
def _process_kept() -> Iterator[None]:
    """Restore what Trainer and accelerate change in the process: environment, random states, shared states."""
    from accelerate.state import AcceleratorState, GradientState, PartialState  # heavy

    environment = dict(os.environ)
    shared = [each._shared_state for each in (PartialState, AcceleratorState, GradientState)]  # noqa: SLF001
    held = [dict(state) for state in shared]
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        stack.enter_context(random_state.seeded(0))
        try:
            for name in [name for name in environment if name.startswith("ACCELERATE_")]:
                del os.environ[name]  # a launcher's settings are no property of the packages
            for state in shared:
                state.clear()
            with living_set_aside():
                yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            for state, before in zip(shared, held, strict=True):
                state.clear()
                state.update(before)
