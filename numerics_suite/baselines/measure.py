"""Measure one cell: everything that a baseline holds of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import torch
from torch import nn

from numerics_suite.baselines import bits
from numerics_suite.baselines.batches import draw_batches, draw_uses, tensors_of, training_of
from numerics_suite.baselines.contract import contract
from numerics_suite.baselines.curve import training_curve
from numerics_suite.baselines.deterministic_head import head_by_formula, head_statistics
from numerics_suite.baselines.precision import CellRuns, errors, gradient_errors, module_errors, run_cell
from numerics_suite.baselines.records import CellBaseline, ModuleRecord, Sketch, StoredBatch, TrainingCurve
from numerics_suite.baselines.sampling_error import ROUNDOFF
from numerics_suite.baselines.sketch import Sketcher
from numerics_suite.baselines.tensors import tensor_records
from numerics_suite.baselines.trace import ModuleTrace, Trace, answer_record, answer_records, trace
from numerics_suite.baselines.uses import BITS, Uses, run_uses
from numerics_suite.devices.condition import dtype_of
from numerics_suite.devices.kinds import kind_of
from numerics_suite.engine import reference_ops
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.digests import tensor_digest
from numerics_suite.engine.environment import describe_environment, describe_machine
from numerics_suite.engine.references import no_reference
from numerics_suite.observations.local_error import LocalError
from numerics_suite.observations.roundoff import unit_roundoff
from numerics_suite.subjects.quiet import quiet_transformers

NEED_TRUE = ("answers", "modules", "gradients", "true_loss", "error", "inherent")
"""Parts that need the true fp64 run."""


def measure_cell(
    context: CellContext,
    batches: Sequence[StoredBatch] | None = None,
    checks: Sequence[str] = (),
    uses: Sequence[StoredBatch] = (),
) -> CellBaseline:
    """Everything that a baseline holds of the cell.

    Args:
        context: of the cell; its model is left as it was.
        batches: those of an earlier baseline, used as they are; None draws them by formula.
        checks: ids of the checks that apply to the cell.
        uses: those of the earlier baseline; drawn where `batches` are.

    Raises:
        NotApplicableError: a plain module without a batch of its own.
    """
    # What a release says of deprecated names is measured as its contract.
    with quiet_transformers() if "transformers" in sys.modules else nullcontext():
        return _measure(context, batches, checks, uses)


def _measure(
    context: CellContext, batches: Sequence[StoredBatch] | None, checks: Sequence[str], uses: Sequence[StoredBatch]
) -> CellBaseline:
    used = tuple(draw_batches(context) if batches is None else batches)
    asked = tuple(draw_uses(context) if batches is None else uses)
    drawn_head = head_statistics(context)
    left_out: dict[str, str] = {}
    error, inherent, count = math.nan, math.nan, 0
    # Releases from 5.2 on leave hooks in a model that was asked for its hidden states.
    with reference_ops.preserved(context.model), head_by_formula(context):
        tensors = tensor_records(context.model)
        found = _true_runs(context, used)
        beside = Uses() if found.left_out else run_uses(context, asked, used)
        seen = run_cell(context, used, found, left_out)
        local = module_errors(context, used, left_out)
        curve = training_curve(context, tensors_of(training_of(used), context), found)
        relied_on = contract(context, used, drawn_head, left_out)
        if not found.left_out:
            error, inherent, count = errors(context, used, found, seen, left_out)
    if found.no_gradients:
        left_out["gradients"] = found.no_gradients
    if found.left_out:
        left_out |= dict.fromkeys(NEED_TRUE, no_reference(found.left_out))
        found = replace(found, answers={}, modules={}, loss=math.nan, gradients=())
    return _record(
        context,
        found,
        replace(seen, bits={**seen.bits, **({BITS: beside.bits} if beside.bits else {})}),
        batches=used,
        modules=_modules(context.model, found.modules, local, context.cell.precision),
        uses=asked,
        use_answers=tuple(answer_record(name, answer) for name, answer in beside.answers.items()),
        use_modules=_modules(context.model, beside.modules, {}, context.cell.precision),
        tensors=tensors,
        error=error,
        inherent=inherent,
        error_count=count,
        curve=curve,
        contract=relied_on,
        checks=tuple(checks),
        left_out=dict(sorted({**left_out, **beside.left_out}.items())),
    )


def _true_runs(context: CellContext, batches: tuple[StoredBatch, ...]) -> Trace:
    try:
        return trace(context, batches)
    except Exception as error:
        if not context.subject.quantized:
            raise
        # Its kernels are not torch's own, and may refuse float64 in any way.
        reason = f"a quantised layer ({type(error).__name__})"
        return Trace(answers={}, modules={}, loss=math.nan, gradients=(), left_out=(reason,))


def _record(
    context: CellContext,
    found: Trace,
    seen: CellRuns,
    *,
    batches: tuple[StoredBatch, ...],
    curve: TrainingCurve,
    **parts: Any,
) -> CellBaseline:
    digests = dict(seen.bits)
    if not curve.reason:
        numbers = (curve.losses, curve.norms, curve.true_losses, curve.true_norms)
        digests["curve"] = tensor_digest(torch.tensor(part, dtype=torch.float64) for part in numbers)
    return CellBaseline(
        cell=replace(context.cell, device=kind_of(context.cell.device)),
        subject=_subject_facts(context),
        environment={**describe_environment(context.cell.device), "machine": describe_machine(context.cell.device)},
        recipe=_recipe(context, curve),
        batches=batches,
        answers=answer_records(found, batches),
        true_loss=found.loss,
        gradients=gradient_errors(found, seen),
        bits={**digests, "cell": bits.digest_of_digests(digests)},
        headroom_bits=seen.least.bits if seen.least is not None else math.inf,
        headroom_module=seen.least.module if seen.least is not None else None,
        curve=curve,
        **parts,
    )


def _modules(
    model: nn.Module, found: Mapping[str, ModuleTrace], local: Mapping[str, LocalError], precision: str
) -> tuple[ModuleRecord, ...]:
    """Records of all modules; one unit for their errors, whatever dtype a module computes in, or a lower one would hide."""
    roundoff = ROUNDOFF[precision]
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    records = []
    for name, states in found.items():
        error = local.get(name)
        record = ModuleRecord(
            name=name,
            kind=kinds[name],
            given=_sketch(states.given),
            gave=_sketch(states.gave),
            local_error=None if error is None else error.rms_roundoffs * _unit(error) / roundoff,
            local_count=0 if error is None else error.count,
        )
        records.append(record)
    return tuple(records)


def _unit(error: LocalError) -> float:
    return unit_roundoff(dtype_of(error.dtype))


def _sketch(sketcher: Sketcher) -> Sketch | None:
    return sketcher.sketch() if sketcher.count else None


def _subject_facts(context: CellContext) -> dict[str, Any]:
    """Facts about the subject, and no path: the same checkpoint elsewhere gives the same file."""
    subject = context.subject
    return {
        "source": PurePath(subject.source).name if subject.kind == "directory" else subject.source,
        "kind": subject.kind,
        "revision": subject.revision,
        "digest": subject.digest,
        "family": subject.family,
        "model_class": type(context.model).__name__,
        "parameters": sum(p.numel() for p in context.model.parameters()),
        "stored_dtype": subject.stored_dtype,
        "num_labels": context.num_labels,
        "new_head": subject.new_head,
    }


def _recipe(context: CellContext, curve: TrainingCurve) -> dict[str, Any]:
    request = context.request
    return {
        "task": context.subject.task,
        "seed": request.seed,
        "steps": request.plan.steps,
        "optimizer": request.plan.optimizer,
        "lr": request.plan.lr,
        "max_grad_norm": request.plan.max_grad_norm,
        "scope": curve.scope,
    }
