"""What the settings ask of every cell, as a context takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from numerics_suite.core.records import Batch, Subject
from numerics_suite.engine.training_loop import TrainingPlan
from numerics_suite.inputs.effort import Effort
from numerics_suite.inputs.vocabulary import InputSpace
from numerics_suite.subjects.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from numerics_suite.baselines.records import CellBaseline


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The settings that apply to every cell.

    Attributes:
        seed: `--seed`.
        rows: `--batch-size`.
        length: `--seq-len`.
        effort: how many batches are examined, and how large they are.
        plan: how cells are trained.
        data: the user's own batch as a tokenizer makes it, None without `--data`.
        tokenizer: opens the subject's tokenizer; None where it has none.
        baseline: what was recorded of the cell, None without a baseline.
        applicable: ids of the checks that apply to the cell.
        packing: the ways in which rows are packed; each that the installed release supports where empty.
    """

    seed: int = 0
    rows: int = 4
    length: int = 64
    effort: Effort = field(default_factory=Effort)
    plan: TrainingPlan = field(default_factory=TrainingPlan)
    data: Callable[[Subject, InputSpace, Any], Batch] | None = None
    tokenizer: Callable[[Subject], Any | None] = load_tokenizer
    baseline: CellBaseline | None = None
    applicable: tuple[str, ...] = ()
    packing: tuple[str, ...] = ()
