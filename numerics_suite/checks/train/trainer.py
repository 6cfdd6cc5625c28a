"""train.trainer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from numerics_suite.checks.train import _stack_faults as faults
from numerics_suite.checks.train._stack_batch import StackSubject, smoothed, stack_of
from numerics_suite.checks.train.labels import defined_loss
from numerics_suite.core.attributes import with_attribute
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.exact import AGREED
from numerics_suite.core.numbers import nan_last
from numerics_suite.core.records import Fact, Measurement
from numerics_suite.core.registry import check
from numerics_suite.engine.calls import takes_decoder_ids
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.installed_trainer import Step, Way, accelerate_step, trainer_step, whole_gradient
from numerics_suite.engine.references import trusted
from numerics_suite.inputs.labels import labels_in_mean
from numerics_suite.inputs.targets import targets_of
from numerics_suite.observations.roundoff import GradientComparison, filled, gradient_errors, relative_error

TIMES = "times the whole batch's gradient"
"""Fact: projection of the optimizer's gradient on the right one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One way to train, with expected and actual gradient.

    Attributes:
        name: of the measurement.
        words: the way, as in "with NAME".
        wanted: the expected gradient, that of the whole batch.
        step: the Trainer's.
        fault: finds the code at fault, given the projection of the actual gradient on the expected one; None if it is
            the model's own, which other checks report.
    """

    name: str
    words: str
    wanted: Step
    step: Step
    fault: Callable[[float], faults.Fault | None]


@check(scope="subject", trains=True, needs=("token-ids",))
def trainer(context: CellContext) -> Iterable[Measurement]:
    """Do the installed Trainer, accelerate and peft give the optimizer the gradient of the whole batch's loss?

    In true fp64, on the CPU, over a few short rows with unequal numbers of labels: with accumulation, an adapter, a
    loop over accelerate, label smoothing, a padding-free collator, checkpointing and clipping. It judges the installed
    packages on the subject's class, so once for each subject.
    """
    stack = stack_of(context)
    try:
        # One by one: the gradients of a way are dropped before those of the next one are there.
        found = [measured for measured in map(_measured, _trials(stack)) if measured is not None]
    except ImportError as error:
        reason = f"transformers' Trainer cannot be made: {str(error).strip().splitlines()[0]}"
        raise NotApplicableError(reason) from error
    facts = {f"fault of {measured.name}": str(fault) for measured, fault in found if fault is not None}
    for measured, fault in found:
        yield measured if fault is None else replace(measured, facts={**measured.facts, **facts})


def _measured(trial: Trial) -> tuple[Measurement, faults.Fault | None] | None:
    """The worst difference of a parameter's gradient, and whose fault it is; None where it is the model's own.

    A missing gradient counts as zero.
    """
    trusted((*trial.wanted.left_out, *trial.step.left_out))
    wanted = {name: value for name, value in trial.wanted.gradients.items() if bool(value.any())}
    compared = GradientComparison.of(filled(trial.step.gradients, wanted), wanted)
    errors = compared.errors()
    worst = max(errors, key=lambda name: nan_last(errors[name]))
    measured = Measurement(name=trial.name, value=errors[worst], unit="ratio")
    if measured.value <= AGREED:
        return measured, None
    times = compared.projection(wanted)
    fault = trial.fault(times)
    if fault is None:
        return None
    facts: dict[str, Fact] = {TIMES: times, "most in": worst, "with": trial.words, "fault": fault.sentence}
    return replace(measured, source=fault.source, facts=facts), fault


def _differs(got: Step, wanted: Step) -> bool:
    errors = gradient_errors(got.gradients, wanted.gradients)
    return not all(error <= AGREED for error in errors.values())


# --- the ways --------------------------------------------------------------------------------------------------------


def _own_loss(output: Any) -> Tensor:
    loss: Tensor = output["loss"]
    return loss


def _trials(stack: StackSubject) -> Iterator[Trial]:
    whole = _whole(stack)
    rows = len(stack.tensors["input_ids"])
    shifts = stack.task == "causal-lm" and not takes_decoder_ids(stack.plain)
    if shifts:
        yield _counting(stack)
    step = trainer_step(stack.model, stack.rows(), Way(micro_batches=rows))
    yield Trial(
        name="accumulation",
        words=f"gradient accumulation over {rows} micro-batches",
        wanted=whole,
        step=step,
        fault=lambda times: faults.fault_of_count(stack, step, times),
    )
    if not stack.adapted and not _differs(step, whole) and find_spec("peft") is not None:
        yield from _adapter(stack, rows)
    yield _loop(stack, whole)
    if _smooths(stack):
        yield _smoothing(stack, rows)
    if shifts:
        yield from _packing(stack, whole)
    if getattr(stack.plain, "supports_gradient_checkpointing", False):
        for reentrant in (True, False):
            with suppress(CheckpointError):  # it recomputes something else: `train.checkpointing` reports it
                yield _checkpointing(stack, whole, reentrant=reentrant)
    yield _clipping(stack, whole)


def _whole(stack: StackSubject) -> Step:
    """The gradient of the class's own loss over the whole batch.

    Raises:
        NotApplicableError: that loss is not the one by definition: the class is at fault, which `train.labels` reports;
            or an encoder-decoder's, whose labels another rule shifts.
    """
    if stack.task == "causal-lm" and takes_decoder_ids(stack.plain):
        reason = "transformers' Trainer is checked with decoders and classifiers, not with encoder-decoders"
        raise NotApplicableError(reason)
    pair: dict[str, Tensor] = {}

    def loss_of(output: Any) -> Tensor:
        config: Any = stack.plain.config
        targets = targets_of(config.to_dict(), int(getattr(config, "num_labels", 2)))
        pair["defined"] = defined_loss(output["logits"], stack.tensors["labels"], stack.task, targets)
        pair["own"] = _own_loss(output)
        return pair["own"]

    whole = whole_gradient(stack.model, stack.tensors, loss_of)
    if not relative_error(pair["own"].detach(), pair["defined"]) <= AGREED:
        reason = "the class's own loss is not that of the labels that count (train.labels)"
        raise NotApplicableError(reason)
    return whole


def _counting(stack: StackSubject) -> Trial:
    from_the_first = replace(stack, tensors=faults.taught(stack.tensors, stack.from_the_first))
    step = trainer_step(stack.model, from_the_first.rows(), Way())
    return Trial(
        name="label-count",
        words="labels that count from a row's first token on",
        wanted=whole_gradient(stack.model, from_the_first.tensors, _own_loss),
        step=step,
        fault=lambda times: faults.fault_of_counting(from_the_first, step, times),
    )


def _adapter(stack: StackSubject, rows: int) -> Iterator[Trial]:
    """LoRA of peft on every linear layer, with values in both of its halves."""
    from peft import LoraConfig, get_peft_model  # heavy

    copied: Any = copy.deepcopy(stack.model)
    try:
        model = get_peft_model(copied, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    except ValueError:  # a model without a layer that peft knows
        return
    adapted = replace(stack, model=model)
    step = trainer_step(model, stack.rows(), Way(micro_batches=rows))
    yield Trial(
        name="adapter",
        words=f"an adapter of peft and gradient accumulation over {rows} micro-batches",
        wanted=whole_gradient(model, stack.tensors, _own_loss),
        step=step,
        fault=lambda times: faults.fault_of_adapter(adapted, step, times),
    )


def _loop(stack: StackSubject, whole: Step) -> Trial:
    """A loop over accelerate that weights each row by its labels, as accelerate documents."""
    rows = stack.rows()
    counts = [labels_in_mean(stack.tensors["labels"][row : row + 1], stack.task) for row in range(len(rows))]
    return Trial(
        name="accelerate-loop",
        words=f"a loop over accelerate that accumulates over {len(rows)} micro-batches",
        wanted=whole,
        step=accelerate_step(stack.model, rows, [each / sum(counts) for each in counts]),
        fault=lambda _: faults.fault_of_accelerate(),
    )


def _smooths(stack: StackSubject) -> bool:
    """Label smoothing is for classes, and the Trainer takes the labels away from a decoder that reads them."""
    config = stack.plain.config
    single = getattr(config, "problem_type", None) in {None, "single_label_classification"}
    classes = stack.task == "causal-lm" or (single and int(getattr(config, "num_labels", 0)) > 1)
    return classes and not takes_decoder_ids(stack.plain)


def _smoothing(stack: StackSubject, rows: int) -> Trial:
    way = Way(micro_batches=rows, arguments={"label_smoothing_factor": faults.SMOOTHING})
    step = trainer_step(stack.model, stack.rows(), way)
    loss = smoothed(stack, faults.SMOOTHING, shifted=stack.task == "causal-lm")
    return Trial(
        name="label-smoothing",
        words=f"label smoothing and {rows} micro-batches",
        wanted=whole_gradient(stack.model, stack.tensors, loss),
        step=step,
        fault=lambda times: faults.fault_of_smoothing(stack, step, times, _differs),
    )


def _packing(stack: StackSubject, whole: Step) -> Iterator[Trial]:
    """Rows packed into one, where the model itself, without its cache, keeps them apart by their positions."""
    import transformers

    collator = getattr(transformers, "DataCollatorWithFlattening", None)
    if collator is None:
        return
    tensors = stack.packed()
    try:
        apart = not _differs(whole_gradient(stack.model, tensors, _own_loss), whole)
    except (RuntimeError, ValueError, TypeError):  # no position_ids, or none of that form
        return
    if not apart:
        return
    step = trainer_step(stack.model, stack.unpadded(), Way(collator=collator()))

    def fault(_times: float) -> faults.Fault:
        with with_attribute(stack.plain.config, "use_cache", False):
            again = trainer_step(stack.model, stack.unpadded(), Way(collator=collator()))
        return faults.fault_of_packing(with_cache=not _differs(again, whole))

    yield Trial(name="padding-free", words="a padding-free collator", wanted=whole, step=step, fault=fault)


def _checkpointing(stack: StackSubject, whole: Step, *, reentrant: bool) -> Trial:
    arguments: Mapping[str, Any] = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    kind = "reentrant" if reentrant else "non-reentrant"
    return Trial(
        name=f"{kind}-checkpointing",
        words=f"{kind} checkpointing",
        wanted=whole,
        step=trainer_step(stack.model, stack.rows(), Way(arguments=arguments)),
        fault=lambda _: (
            None
            if _checkpoints_wrongly(stack, whole, arguments)
            else faults.fault_of_checkpointing(reentrant=reentrant)
        ),
    )


def _checkpoints_wrongly(stack: StackSubject, whole: Step, arguments: Mapping[str, Any]) -> bool:
    """Whether checkpointing is wrong without the Trainer too, which `train.checkpointing` reports."""
    model: Any = stack.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments["gradient_checkpointing_kwargs"])
    try:
        again = whole_gradient(model, stack.tensors, _own_loss)
    finally:
        model.gradient_checkpointing_disable()
    return whole.gradients.keys() != again.gradients.keys() or _differs(again, whole)


def _clipping(stack: StackSubject, whole: Step) -> Trial:
    """Half of the norm, by torch's own function: the whole batch's gradient is clipped, not each micro-batch's."""
    clipped = {name: value.clone() for name, value in whole.gradients.items()}
    holders = [value.detach() for value in whole.gradients.values()]
    for holder, value in zip(holders, clipped.values(), strict=True):
        holder.grad = value
    limit = 0.5 * float(torch.nn.utils.get_total_norm(list(clipped.values())))
    torch.nn.utils.clip_grad_norm_(holders, limit)
    return Trial(
        name="clipping",
        words="clipping to half the norm",
        wanted=replace(whole, gradients=clipped),
        step=trainer_step(stack.model, stack.rows(), Way(arguments={"max_grad_norm": limit})),
        fault=lambda _: faults.fault_of_clipping(),
    )
