"""The records of a small-batch rehearsal: training tried on the user's own texts before it is begun in earnest."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsedRun:
    """Training in one precision.

    Attributes:
        largest_logit: largest magnitude among the initial logits; NaN where they are not finite.
        losses: before each step and after the last.
        gradient_norms: total norm of each step, before any clipping.
        clipped_losses: the same with the gradient norm clipped to 1.0.
        scales: the loss scale after each step, empty without a scaler.
        stopped: what was not finite, at which step; empty where everything was.
        stopped_clipped: the same of the clipped run.
        largest_stable_lr: to within a factor of 1.4; None where none was found.
        at_least: the search ended at its upper end, so a larger one may be stable too.
    """

    precision: str
    largest_logit: float
    losses: tuple[float, ...]
    gradient_norms: tuple[float, ...]
    clipped_losses: tuple[float, ...]
    scales: tuple[float, ...]
    skipped: int
    stopped: str
    stopped_clipped: str
    largest_stable_lr: float | None
    at_least: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One line of the recipe: what to set, to what, and the measurement behind it."""

    setting: str
    value: str
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """One subject's rehearsal.

    Attributes:
        attn: the attention implementation that it was trained with.
        chance: loss of a classifier that knows nothing, ln(labels); None for other tasks.
        runs: one for each precision that trains.
    """

    subject: str
    task: str
    attn: str
    device: str
    batch: str
    optimizer: str
    lr: float
    steps: int
    chance: float | None
    runs: tuple[RehearsedRun, ...]
    recipe: tuple[Advice, ...]
