"""Two baselines of one cell as numbers: what differs, by how much, and where it starts. Nothing is judged here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from numerics_suite.baselines.batch_match import (
    CANCELLED,
    Matching,
    deviation,
    gradients_matched,
    modules_matched,
    sketch_deviation,
    worst,
)
from numerics_suite.baselines.contracts import ContractChange, contract_changes
from numerics_suite.baselines.error_ratio import Errors, compared, even, gradient_growth
from numerics_suite.baselines.fused_experts import Fusion, fused_parameters, together
from numerics_suite.baselines.inline_arrays import inlined
from numerics_suite.baselines.localize import gradient_place, module_place
from numerics_suite.baselines.sampling_error import ROUNDOFF, accumulation, two_draws
from numerics_suite.baselines.tensors import TensorChange, tensor_changes
from numerics_suite.baselines.training_change import CurveChange, curve_change, lost_curve
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.exact import AGREED

if TYPE_CHECKING:
    from numerics_suite.baselines.records import AnswerRecord, CellBaseline, Sketch
    from numerics_suite.core.records import Cell

USES = "use"
"""How the names of uses begin among what could not be measured, and what the bits of all are called, with an s."""

RECIPE_OPTIONS = {"seed": "--seed", "steps": "--steps", "optimizer": "--optimizer", "lr": "--lr"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """How far a true fp64 value of the new version is from the old one's, over the root mean square of the old one."""

    name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """What became of one cell.

    Attributes:
        old: its key in the old baseline.
        new: and in the new one.
        environment: what differs of it: `torch 2.12.0 → 2.13.0`.
        subject: what differs of its facts: `digest a → b`.
        answers: true fp64.
        loss: true fp64.
        losses: the true fp64 loss itself, old and new.
        gradients: true fp64, by parameter of the new version.
        module: the first module that differs in true fp64, None where none does or none is at fault.
        internal: modules that give something else in true fp64.
        errors: of the whole model, None where neither has one.
        local: errors of the modules that both measured, in the order in which they return.
        headroom: new minus old, bits.
        gradient_errors: of all gradients together, None where neither has them; `name` is the module where errors begin to grow.
        curve: training, None where neither has any.
        contract: entries that changed, were removed or were added.
        vanished: what the old baseline holds and the new one does not: `check train.amp`, `answer right.logits`.
        gone: parts of the old program that the new one does not run or have: `module model.norm`, `gradient of lm_head.weight`.
        tensors: parameters and buffers that are not what they were.
        fused: parameters that were found by value, as parts of another or made of several.
        inlined: modules that are no longer called, inside others that give the same.
        unrecorded: what only one baseline holds since it has another schema.
    """

    old: Cell
    new: Cell
    bits: tuple[str, ...]
    same_bits: bool
    environment: tuple[str, ...]
    subject: tuple[str, ...]
    answers: tuple[Deviation, ...]
    loss: float
    losses: tuple[float, float]
    gradients: tuple[Deviation, ...]
    module: str | None
    modules: Matching
    internal: tuple[str, ...]
    errors: Errors | None
    local: tuple[Errors, ...]
    headroom: float
    curve: CurveChange | None
    contract: tuple[ContractChange, ...]
    vanished: tuple[str, ...]
    gone: tuple[str, ...]
    gradient_errors: Errors | None = None
    tensors: tuple[TensorChange, ...] = ()
    fused: tuple[Fusion, ...] = ()
    inlined: tuple[str, ...] = ()
    unrecorded: tuple[str, ...] = ()


def difference(old: CellBaseline, new: CellBaseline) -> Difference:
    """Compare one cell of two versions.

    Raises:
        BadInputError: they were not; the line says what differs and how to record alike.
    """
    _refuse_other_question(old, new)
    modules = modules_matched(old.modules, new.modules)
    parameters = gradients_matched(old.gradients, new.gradients)
    fused = fused_parameters(old, new, parameters)
    within = inlined(old, new, modules, parameters, fused)
    plain, lost_answers = _answers(old.answers, new.answers)
    uses, unrecorded = _both_recorded(old, new)
    used, lost_uses = _answers(old.use_answers, new.use_answers) if uses else ((), [])
    gradients = _gradients(old, new, parameters, fused)
    loss = deviation(np.float64(old.true_loss), np.float64(new.true_loss), abs(old.true_loss))
    internal = [(i, j) for i, j in modules.pairs if _apart(old.modules[i].gave, new.modules[j].gave)]
    module = None
    if not all(item.value <= AGREED for item in plain):
        module = module_place(old.modules, new.modules, modules)
    elif not loss <= AGREED:
        # Where the states of training part, a module is at fault, else the loss itself, which is none.
        module = module_place(old.modules, new.modules, modules, root=False)
    elif not all(item.value <= AGREED for item in used):
        module = _use_place(old, new, used) or module_place(old.modules, new.modules, modules, root=False)
    else:
        wrong = [item.name for item in gradients if not item.value <= AGREED]
        module = gradient_place(new.modules, wrong) if wrong else None
    bits = tuple(
        part
        for part in {**old.bits, **new.bits}
        if part != "cell" and (uses or part != f"{USES}s") and old.bits.get(part) != new.bits.get(part)
    )
    # The digest of all says it, unless only one of the two covers uses.
    same_bits = old.bits.get("cell") == new.bits.get("cell") if uses or not (old.uses or new.uses) else not bits
    environment = _changes(_flat_environment(old.environment), _flat_environment(new.environment))
    errors, local, unmeasured = _errors(old, new, modules, elsewhere=_elsewhere(environment), same_bits=same_bits)
    lost = [
        *(f"check {check}" for check in old.checks if check not in new.checks),
        *lost_answers,
        *lost_uses,
        *unmeasured,
        *lost_curve(old.curve, new.curve),
        *(
            f"{name} ({reason})"
            for name, reason in new.left_out.items()
            if name not in old.left_out and (uses or not name.startswith(f"{USES} "))
        ),
    ]
    return Difference(
        old=old.cell,
        new=new.cell,
        bits=bits,
        same_bits=same_bits,
        environment=environment,
        subject=_changes(old.subject, new.subject, ("revision", "digest", "stored_dtype", "parameters", "model_class")),
        answers=(*plain, *used),
        loss=loss,
        losses=(old.true_loss, new.true_loss),
        gradients=gradients,
        module=module,
        modules=modules,
        internal=tuple(new.modules[j].name for _, j in internal),
        errors=errors,
        local=local,
        headroom=new.headroom_bits - old.headroom_bits,
        curve=curve_change(old, new),
        contract=contract_changes(old.contract, new.contract),
        vanished=tuple(dict.fromkeys(lost)),
        gone=(
            *(f"module {name}" for name in modules.vanished if name not in within),
            *(f"gradient of {name}" for name in parameters.vanished if not any(name in fusion.old for fusion in fused)),
        ),
        gradient_errors=None if same_bits else gradient_growth(old, new, parameters),
        tensors=tensor_changes(old, new, parameters.renamed, fused),
        fused=fused,
        inlined=tuple(name for name in modules.vanished if name in within),
        unrecorded=unrecorded,
    )


# --- can they be compared ----------------------------------------------------------------------------------------------


def _refuse_other_question(old: CellBaseline, new: CellBaseline) -> None:
    """Numbers of other batches or another recipe say nothing of a change.

    Raises:
        BadInputError: naming what differs.
    """
    where = f"{new.cell.id} ({new.cell.task}) cannot be compared"
    for name in sorted({*old.recipe, *new.recipe}):
        ours, theirs = old.recipe.get(name), new.recipe.get(name)
        if ours != theirs:
            option = RECIPE_OPTIONS.get(name, f"--{name.replace('_', '-')}")
            message = f"{where}: recorded with {name} {ours} and {theirs}; record both with the same {option}"
            raise BadInputError(message)
    other = _other_batches(old, new)
    if other:
        message = (
            f"{where}: measured on other batches ({other}); record both with the same --seed, --batch-size, --seq-len "
            "and --data, or hold the new version to the old batches with check --baseline"
        )
        raise BadInputError(message)


def _other_batches(old: CellBaseline, new: CellBaseline) -> str:
    ours = {batch.name: batch.tensors for batch in (*old.batches, *(old.uses if new.uses else ()))}
    theirs = {batch.name: batch.tensors for batch in (*new.batches, *(new.uses if old.uses else ()))}
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name not in ours or name not in theirs:
            return f"'{name}' is only in the {'old' if name in ours else 'new'} one"
        for key in sorted({*ours[name], *theirs[name]}):
            left, right = ours[name].get(key), theirs[name].get(key)
            if left is None or right is None or left.shape != right.shape or not np.array_equal(left, right):
                return f"{name}.{key} differs"
    return ""


# --- semantics ---------------------------------------------------------------------------------------------------------


def _apart(old: Any, new: Any) -> bool:
    return old is not None and new is not None and not sketch_deviation(old, new) <= AGREED


def _both_recorded(old: CellBaseline, new: CellBaseline) -> tuple[bool, tuple[str, ...]]:
    """Whether both hold uses, and what only one of them can be asked."""
    lacks = []
    for what, ours, theirs in (
        ("paddings, decoding by generate, save and load, the router's loss", old.uses, new.uses),
        ("the tensors themselves", old.tensors, new.tensors),
    ):
        if bool(ours) != bool(theirs):
            lacks.append(f"{what}: the {'new' if ours else 'old'} baseline holds none; record it again")
    return bool(old.uses and new.uses), tuple(lacks)


def _use_place(old: CellBaseline, new: CellBaseline, used: Sequence[Deviation]) -> str | None:
    """Where the uses part; nothing where only the router's loss did, which has no states of its own."""
    if all(item.value <= AGREED or item.name.startswith("router.") for item in used):
        return None
    return module_place(old.use_modules, new.use_modules, modules_matched(old.use_modules, new.use_modules))


def _answers(old: Sequence[AnswerRecord], new: Sequence[AnswerRecord]) -> tuple[tuple[Deviation, ...], list[str]]:
    """Deviation of each answer, and those that are no longer given."""
    found, lost = [], []
    others = {answer.name: answer for answer in new}
    for answer in old:
        other = others.get(answer.name)
        if other is None:
            lost.append(f"answer {answer.name}")
            continue
        values = [
            deviation(answer.values, other.values, answer.rms),
            deviation(answer.top_values, other.top_values, answer.rms),
            deviation(np.float64(answer.rms), np.float64(other.rms), answer.rms),
        ]
        found.append(Deviation(name=answer.name, value=worst(values)))
    return tuple(found), lost


def _gradients(
    old: CellBaseline, new: CellBaseline, parameters: Matching, fused: Sequence[Fusion]
) -> tuple[Deviation, ...]:
    sizes = [record.gradient.rms for record in old.gradients]
    largest = max((size for size in sizes if math.isfinite(size)), default=0.0)
    found = []
    for i, j in parameters.pairs:
        ours, theirs = old.gradients[i].gradient, new.gradients[j].gradient
        # What cancels in both is zero but for the order of its sum; it has no size of its own.
        scale = largest if ours.rms <= CANCELLED * largest else ours.rms
        found.append(Deviation(name=new.gradients[j].name, value=sketch_deviation(ours, theirs, scale)))
    before, now = ({record.name: record.gradient for record in side.gradients} for side in (old, new))
    for fusion in fused:
        if before.keys() >= set(fusion.old) and now.keys() >= set(fusion.new):
            size, other = _size(fusion.old, before), _size(fusion.new, now)
            scale = largest if size <= CANCELLED * largest else size
            found.append(Deviation(name=fusion.new[0], value=deviation(np.float64(size), np.float64(other), scale)))
    return tuple(found)


def _size(names: Sequence[str], gradients: Mapping[str, Sketch]) -> float:
    """Root mean square of several gradients together, which is that of what they were fused into."""
    whole = together(names, [gradients[name] for name in names])
    return math.sqrt(whole.squares / whole.count)


# --- precision ---------------------------------------------------------------------------------------------------------


def _errors(
    old: CellBaseline, new: CellBaseline, modules: Matching, *, elsewhere: bool, same_bits: bool
) -> tuple[Errors | None, tuple[Errors, ...], list[str]]:
    """Errors of the model and its modules, and the modules that are no longer measured."""
    shapes = [record.gradient.shape for record in old.gradients]
    precision = old.cell.precision
    order = accumulation(shapes, precision) if elsewhere else 0.0
    pairs, unmeasured = [], []
    for i, j in modules.pairs:
        ours, theirs = old.modules[i], new.modules[j]
        if _apart(ours.gave, theirs.gave):
            continue  # it gives something else (a router its logits, no longer its weights): the block around it counts
        if ours.local_error is not None and theirs.local_error is not None:
            pairs.append((ours, theirs))
        elif ours.local_error is not None:
            unmeasured.append(f"local error of {theirs.name}")
    comparisons = len(pairs) + 1
    local = []
    for ours, theirs in pairs:
        assert ours.local_error is not None and theirs.local_error is not None  # noqa: PT018 - one fact
        draws = two_draws(min(ours.local_count, theirs.local_count), comparisons)
        local.append(compared(theirs.name, ours.local_error, theirs.local_error, draws, order))
    # An error below one rounding of the answer itself is none.
    least = ROUNDOFF[precision]
    draws = two_draws(min(old.error_count, new.error_count), comparisons)
    whole = None
    if not (math.isnan(old.error) and math.isnan(new.error)) and "error" not in {*old.left_out, *new.left_out}:
        whole = compared("", old.error, new.error, draws, order * least, least)
    if same_bits:  # the same program on the same bits: what differs is the measuring
        return None if whole is None else even(whole), tuple(even(item) for item in local), unmeasured
    return whole, tuple(local), unmeasured


# --- facts -------------------------------------------------------------------------------------------------------------


def _flat_environment(environment: Mapping[str, Any]) -> dict[str, Any]:
    packages = environment.get("packages", {})
    rest = {key: value for key, value in environment.items() if key != "packages"}
    return {**rest, **packages} if isinstance(packages, Mapping) else dict(environment)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], only: Sequence[str] | None = None) -> tuple[str, ...]:
    names = only if only is not None else [*old, *(key for key in new if key not in old)]
    return tuple(f"{key} {old.get(key)} → {new.get(key)}" for key in names if old.get(key) != new.get(key))


def _elsewhere(environment: Sequence[str]) -> bool:
    """Whether kernels may sum in another order: another torch, machine or device."""
    own = {
        "transformers",
        "python",
        "tokenizers",
        "safetensors",
        "huggingface-hub",
        "accelerate",
        "peft",
        "hypothesis",
        "pytest",
    }
    return any(line.partition(" ")[0] not in own for line in environment)
