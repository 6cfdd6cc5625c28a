"""Locates a wrong gradient in the installed training stack, with one small experiment for each way that failed.

A fault is written as `KIND at MODULE.CLASS.FUNCTION`, which `judgement/known_faults.py` matches with known faults of
releases; a sentence and the source line go with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.checks.train._stack_batch import StackSubject, smoothed
from numerics_suite.engine.installed_trainer import Step, Way, loss_with, trainer_step, whole_gradient

SMOOTHING = 0.1
"""Label smoothing's epsilon in the trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A fault and the code it is in.

    Attributes:
        kind: one word or two, as in `ignored-count`.
        where: `module.Class.function`.
        sentence: what is wrong, for the finding's title.
        source: `file.py:123`.
    """

    kind: str
    where: str
    sentence: str
    source: str | None = None

    def __str__(self) -> str:
        """As `judgement/known_faults.py` matches it."""
        return f"{self.kind} at {self.where}"


def fault_of_count(stack: StackSubject, step: Step, times: float) -> Fault:
    """Why the loss is not divided by the number of labels of all micro-batches.

    Args:
        stack: model and batch.
        step: the Trainer's, whose gradient is wrong.
        times: how many times the whole batch's gradient it is, by projection.
    """
    model = stack.plain
    owner = _owner(model)
    name = f"{owner.__name__}.forward"
    if None in step.handed or not step.handed:
        # A mean of n means is about the gradient itself, a sum of them about n times it; between the two lies the root of n.
        if times > len(step.handed) ** 0.5 > 1:
            sentence = f"without a num_items_in_batch for {name} the Trainer adds up the micro-batches' means undivided"
            return _in_trainer("undivided-sum", "training_step", sentence)
        if not _takes_items(model):
            line = loss_with(model, stack.tensors)[1]
            sentence = f"{name} takes no num_items_in_batch, so each micro-batch's loss is a mean over its own labels"
            return Fault(kind="no-count", where=_path(owner, "forward"), sentence=sentence, source=line)
        return _in_trainer("unhanded-count", "compute_loss", f"the Trainer hands {name} no num_items_in_batch")
    if step.divided > 1:
        sentence = f"accelerate divides each micro-batch's loss by {step.divided}, which num_items_in_batch has divided already"
        return _in_trainer("divided-twice", "create_accelerator_and_postprocess", sentence)
    single, line = loss_with(model, stack.tensors, num_items_in_batch=torch.tensor(stack.counted))
    double, _ = loss_with(model, stack.tensors, num_items_in_batch=torch.tensor(2 * stack.counted))
    if single and abs(double / single - 1) < 0.25:  # where the count is used, twice the count halves the loss
        sentence = f"{name} accepts num_items_in_batch and never hands it to the loss"
        return Fault(kind="ignored-count", where=_path(owner, "forward"), sentence=sentence, source=line)
    return _in_trainer("unknown", "training_step", "neither the class's loss nor the count of labels explains it")


def fault_of_adapter(stack: StackSubject, step: Step, times: float) -> Fault:
    """Why an adapter gets a wrong gradient although the model's own accumulation is right.

    Args:
        stack: the model with its adapter, and the batch.
        step: the Trainer's, whose gradient is wrong.
        times: see :func:`fault_of_count`.
    """
    losses = [
        loss_with(stack.model, stack.tensors, num_items_in_batch=torch.tensor(many * stack.counted))[0]
        for many in (1, 2)
    ]
    if losses[0] and abs(losses[1] / losses[0] - 1) < 0.25:  # as in `fault_of_count`
        wrapper: Any = type(stack.model)
        sentence = f"{wrapper.__name__}.forward does not hand num_items_in_batch on"
        return Fault(
            kind="lost-count", where=_path(wrapper, "forward"), sentence=sentence, source=_line(wrapper.forward)
        )
    return fault_of_count(stack, step, times)


def fault_of_accelerate() -> Fault:
    """Why a loop that accumulates as accelerate documents gets a wrong gradient."""
    from accelerate import Accelerator  # heavy

    sentence = "what Accelerator.backward accumulates is not the mean over the micro-batches"
    where = _path(Accelerator, "backward")
    return Fault(kind="accumulation", where=where, sentence=sentence, source=_line(Accelerator.backward))


def fault_of_counting(stack: StackSubject, step: Step, times: float) -> Fault:
    """Why a single micro-batch's loss is not divided by its number of labels.

    Args:
        stack: model and batch.
        step: the Trainer's, whose gradient is wrong.
        times: see :func:`fault_of_count`.
    """
    handed = step.handed[-1] if step.handed else None
    if handed is not None and handed != stack.counted:
        sentence = f"the Trainer counts {handed:.0f} labels where {stack.counted} are predicted: a row's first label has no prediction"
        return _in_trainer(
            f"miscount of {type(stack.plain).__name__}", "get_batch_samples", sentence, "_get_num_items_in_batch"
        )
    return fault_of_count(stack, step, times)


def fault_of_smoothing(stack: StackSubject, step: Step, times: float, differs: Callable[[Step, Step], bool]) -> Fault:
    """Why label smoothing gives a wrong gradient.

    Args:
        stack: model and batch.
        step: the Trainer's, whose gradient is wrong.
        times: see :func:`fault_of_count`.
        differs: whether two gradients are unequal.
    """
    way = Way(arguments={"label_smoothing_factor": SMOOTHING})
    once = trainer_step(stack.model, stack.rows(), way)
    unshifted = smoothed(stack, SMOOTHING, shifted=False)
    if stack.task == "causal-lm" and not differs(once, whole_gradient(stack.model, stack.tensors, unshifted)):
        sentence = (
            f"the Trainer shifts labels only for the class names that it knows, and {type(stack.plain).__name__} is none: each token "
            "learns itself"
        )
        return _in_trainer("unshifted-labels", "compute_loss", sentence)
    if not _takes_items(stack.plain):
        return fault_of_count(stack, step, times)
    from transformers.trainer_pt_utils import LabelSmoother  # heavy

    sentence = "LabelSmoother takes the mean over each micro-batch's labels, and the Trainer adds these up"
    line = next((line for line in reversed(step.lines) if line.startswith("trainer_pt_utils.py")), None)
    return Fault(kind="smoothed-means", where=_path(LabelSmoother, "__call__"), sentence=sentence, source=line)


def fault_of_packing(*, with_cache: bool) -> Fault:
    """Why packed rows do not get the gradient of separate rows.

    Args:
        with_cache: with `use_cache=False` in the model's config the Trainer's gradient is right.
    """
    if with_cache:
        sentence = "the Trainer leaves the cache on, with which rows that are packed into one see each other"
        return _in_trainer("cache-on", "compute_loss", sentence)
    from transformers import DataCollatorWithFlattening  # heavy

    sentence = "what DataCollatorWithFlattening makes of the rows is not what they are by themselves"
    return Fault(kind="unknown", where=_path(DataCollatorWithFlattening, "__call__"), sentence=sentence)


def fault_of_checkpointing(*, reentrant: bool) -> Fault:
    """Why checkpointing by the Trainer and without it give different gradients.

    Args:
        reentrant: the kind of it.
    """
    kind = "reentrant" if reentrant else "non-reentrant"
    return _in_trainer("checkpointing", "train", f"{kind} checkpointing that the Trainer turns on changes the gradient")


def fault_of_clipping() -> Fault:
    """Why the Trainer's clipped gradient is wrong."""
    from accelerate import Accelerator  # heavy

    sentence = "what Accelerator.clip_grad_norm_ leaves is not the whole batch's gradient, clipped"
    where = _path(Accelerator, "clip_grad_norm_")
    return Fault(kind="clipping", where=where, sentence=sentence, source=_line(Accelerator.clip_grad_norm_))


def _in_trainer(kind: str, function: str, sentence: str, inner: str = "") -> Fault:
    from transformers import Trainer  # heavy

    found = getattr(Trainer, inner, None) or getattr(Trainer, function, None)
    where = f"{Trainer.__module__}.{Trainer.__name__}.{function}"
    return Fault(kind=kind, where=where, sentence=sentence, source=None if found is None else _line(found))


def _line(function: Callable[..., Any]) -> str | None:
    try:
        code = inspect.unwrap(function).__code__
    except AttributeError:
        return None
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}"


def _path(owner: type, function: str) -> str:
    return f"{owner.__module__}.{owner.__name__}.{function}"


def _owner(model: nn.Module) -> type:
    """The class that defines the model's `forward`, such as the generic classifier that many classes share."""
    return next(each for each in type(model).__mro__ if "forward" in vars(each))


def _takes_items(model: nn.Module) -> bool:
    parameters = inspect.signature(model.forward).parameters
    return "num_items_in_batch" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values())


def taught(tensors: Mapping[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The batch with other labels."""
    return {**tensors, "labels": labels}
