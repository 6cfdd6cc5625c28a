"""How many batches a cell is examined on, and how large they are: from the model's size, `--effort` and the options given.

The same on every machine and in every worker: neither timing nor free memory matters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

SMALL_MODEL: Final = 4_000_000
"""Up to this number of parameters a pass costs less than its overhead, and Hypothesis draws every batch."""

Shape = tuple[int, int]
"""Rows, and tokens of the longest row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """The batches on which the checks of one cell run.

    Attributes:
        drawn: batches that Hypothesis draws for a check, before its share is taken; 0 for none.
        planned: shape of the batches that every check examines before any drawn one, so that their passes are shared; None for none.
        training: shape of the batch that is trained on; None for `--batch-size` rows of `--seq-len` tokens.
        gradient: shape of the batch over which gradients are compared in float64; None for the training batch.
        long_row: whether one row as long as the config allows is examined too.
    """

    drawn: int
    planned: Shape | None = None
    training: Shape | None = None
    gradient: Shape | None = None
    long_row: bool = False

    @property
    def batches(self) -> int:
        """Most batches that a check runs on."""
        return self.drawn + (0 if self.planned is None else 2) + self.long_row


_OF_SMALL: Final = {
    "quick": BatchPlan(drawn=0, planned=(4, 32)),
    "standard": BatchPlan(drawn=10),
    "thorough": BatchPlan(drawn=40, planned=(4, 64), long_row=True),
}
_OF_LARGE: Final = {
    # A pass over a large model is its matrix products: coverage is counted in rows and positions, not in calls. Four rows hold
    # one row of each kind of contents, and 24 tokens of it the longest that `forward.packing` packs; 64 tokens give each entry of a weight's gradient 64 terms.
    # A step costs its tokens twice over beside the optimizer, which counts parameters alone, and half the tokens move every parameter as well.
    "quick": BatchPlan(drawn=0, planned=(4, 16), training=(4, 16), gradient=(4, 8)),
    "standard": BatchPlan(drawn=0, planned=(4, 24), training=(4, 32), gradient=(4, 16)),
    "thorough": BatchPlan(drawn=4, planned=(4, 64), long_row=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """`--effort`, and the options that win over it.

    Attributes:
        name: `quick`, `standard` or `thorough`.
        examples: `--max-examples`, None where it is not set.
        rows: `--batch-size`, None where it is not set.
        length: `--seq-len`, None where it is not set.
    """

    name: str = "standard"
    examples: int | None = None
    rows: int | None = None
    length: int | None = None

    def plan(self, parameters: int) -> BatchPlan:
        """The batches of a model.

        Args:
            parameters: how many it has.
        """
        plan = (_OF_SMALL if parameters <= SMALL_MODEL else _OF_LARGE)[self.name]
        sized = self.rows is not None or self.length is not None
        plan = replace(
            plan,
            planned=self._sized(plan.planned),
            training=self._sized(plan.training),
            gradient=None if sized else plan.gradient,
        )
        if self.examples is not None:  # drawn as asked, and nothing else
            return replace(plan, drawn=self.examples, planned=None, long_row=False)
        return plan

    def _sized(self, shape: Shape | None) -> Shape | None:
        return None if shape is None else (self.rows or shape[0], self.length or shape[1])
