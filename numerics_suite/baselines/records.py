"""What a baseline holds of one cell. Arrays are numpy's, so that two baselines are compared without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from numerics_suite.core.records import Cell

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats: TypeAlias = NDArray[np.float64]
    Ids: TypeAlias = NDArray[np.int64]

SCHEMA_VERSION = 2
"""Since 2 a baseline holds what users run besides a plain call, and the model's tensors."""

OLDEST_SCHEMA = 1
"""The oldest that is read; what it lacks is not compared."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StoredBatch:
    """A batch with its ids, so that no later change of a generator matters.

    Attributes:
        name: `right`, `left`, `training`, …
        tensors: `input_ids`, `attention_mask`, `labels` `[rows, sequence]` (or labels `[rows]`); a factory's own batch as it is.
    """

    name: str
    tensors: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sketch:
    """A tensor in a few numbers: two tensors that differ have sketches that differ, by about as much.

    Attributes:
        count: elements that were sketched (real tokens only).
        projections: `[k]`, sums of the elements with weights by formula, over the square root of their count: of the size of the rms.
    """

    shape: tuple[int, ...]
    count: int
    rms: float
    projections: Floats


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AnswerRecord:
    """The true fp64 answer of the model on one batch.

    Attributes:
        name: `BATCH.logits`, `BATCH.hidden` (where logits are pooled), or a factory's output name.
        values: `[tokens, width]` whole, or 64 projections a token.
        whole: whether `values` is the answer itself.
        top_values: `[tokens, 8]` the largest, empty where whole.
        top_ids: `[tokens, 8]` their ids, empty where whole.
        rms: root mean square of the whole answer.
    """

    name: str
    values: Floats
    whole: bool
    top_values: Floats
    top_ids: Ids
    rms: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModuleRecord:
    """One module over all batches.

    Attributes:
        given: its first floating state as it came in, true fp64; None where it has none with tokens.
        local_error: of the module in the cell's precision on the inputs that it really got, rms in units of u·rms(output) with the
            unit roundoff u of the precision; None where it was not measured.
        local_count: numbers that this rms is taken over.
    """

    name: str
    kind: str
    given: Sketch | None
    gave: Sketch | None
    local_error: float | None = None
    local_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GradientRecord:
    """The true fp64 gradient of one parameter.

    Attributes:
        gradient: true fp64; zero where no gradient reaches the parameter.
        error: of the gradient in the cell's precision, root mean square of its projections' errors over that of the gradient;
            None where it was not measured, or the gradient is what is left of terms that cancel.
    """

    name: str
    gradient: Sketch
    error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorRecord:
    """One parameter or buffer as it is held."""

    name: str
    dtype: str
    values: Sketch


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCurve:
    """Training on the stored batch: in the cell's precision and in true fp64.

    Attributes:
        losses: before each step and after the last, in the cell's precision.
        norms: total gradient norm of each step, in the cell's precision.
        true_losses: the same in true fp64.
        true_norms: the same in true fp64.
        scope: what was trained: `full`, or `last:1` with the head above a billion parameters.
        reason: why there is no curve, empty where there is one.
    """

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    true_losses: tuple[float, ...] = ()
    true_norms: tuple[float, ...] = ()
    scope: str = "full"
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CellBaseline:
    """One cell as it was.

    Attributes:
        cell: `device` is the kind of device (`cpu`, `cuda`), never its number.
        subject: facts of the subject: source, revision, digest, family, model_class, parameters, stored_dtype.
        environment: python, platform, machine, packages.
        recipe: what was asked: seed, steps, optimizer, lr.
        batches: those that everything below was measured on.
        answers: true fp64.
        true_loss: of the training batch, true fp64; NaN where the task has none.
        gradients: true fp64, in the order of the model's parameters.
        modules: in the order in which they first return.
        error: rms of the cell's answers against true fp64, over the rms of these.
        inherent: the same of the rounded run (every op perfect and rounded once); NaN where it was not measured.
        error_count: numbers that are free in it.
        bits: SHA-256 of `logits`, `loss`, `gradients`, `decoding`, `curve` in the cell's precision and in true fp64, and of all of them
            as `cell`; `uses` where there are any.
        headroom_bits: least headroom of any module, and `headroom_module` where.
        contract: JSON: what a caller relies on.
        checks: ids of the checks that applied to the cell.
        left_out: what could not be measured, with the reason, by the name of the part.
        uses: batches of what users run besides a plain call; none for a factory's own batch, and before schema 2.
        use_answers: the true fp64 answers of these.
        use_modules: states around the modules over all uses, without errors of their own.
        tensors: parameters, then buffers; none before schema 2.
    """

    cell: Cell
    subject: Mapping[str, Any]
    environment: Mapping[str, Any]
    recipe: Mapping[str, Any]
    batches: tuple[StoredBatch, ...]
    answers: tuple[AnswerRecord, ...]
    true_loss: float
    gradients: tuple[GradientRecord, ...]
    modules: tuple[ModuleRecord, ...]
    error: float
    inherent: float
    error_count: int
    bits: Mapping[str, str]
    headroom_bits: float
    headroom_module: str | None
    curve: TrainingCurve
    contract: Mapping[str, Any]
    checks: tuple[str, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    uses: tuple[StoredBatch, ...] = ()
    use_answers: tuple[AnswerRecord, ...] = ()
    use_modules: tuple[ModuleRecord, ...] = ()
    tensors: tuple[TensorRecord, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One cell is done.

    Attributes:
        baseline: its measurements, None where there are none.
        error: why it could not be measured, empty elsewhere.
        skipped: why it cannot be had here, of a default list; empty elsewhere.
        bad_input: the error is that no model can be loaded of the subject's files.
    """

    done: int
    total: int
    cell: Cell
    baseline: CellBaseline | None = None
    error: str = ""
    skipped: str = ""
    bad_input: bool = False
