"""The interface of a family's definition, by which one runner computes all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from numerics_suite.definitions.parts import RotaryTable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from numerics_suite.core.records import Task
    from numerics_suite.definitions.parts import ModuleScope


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What every block of one forward pass shares.

    Attributes:
        turn: `scale · exp(i · position · frequency)`, `[B or 1, T, 1, pairs]` complex128.
        visible: `[B, T, T]` bool, which key each query sees.
    """

    turn: Tensor
    visible: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The matrix on top of the last norm.

    Attributes:
        path: of the module, as transformers names it.
        weight: name of the matrix, the embedding's where they are tied.
        bias: name of the bias, None where the head has none.
        sees_pooled_row: a sequence classifier's head gets the pooled row only; else all columns, of which one is then
            picked.
    """

    path: str
    weight: str
    bias: str | None = None
    sees_pooled_row: bool = False


class Oracle(Protocol):
    """One family's definition, with the values that one config gives it."""

    family: ClassVar[str]
    embedding: ClassVar[str]
    blocks: ClassVar[str]
    norm: ClassVar[str]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Oracle:
        """The definition with this `config.json`'s values.

        Raises:
            OracleUnavailable: the definition does not cover this config.
        """
        ...

    @property
    def depth(self) -> int:
        """Number of blocks."""
        ...

    @property
    def eps(self) -> float:
        """The eps of the norms."""
        ...

    @property
    def untrained_row(self) -> int | None:
        """The row of the embedding that gets no gradient through the embedding."""
        ...

    def inv_freq(self) -> Tensor:
        """The exact rotary frequencies, `[pairs]` float64."""
        ...

    def positions(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Positions where the batch has none of its own, `[B or 1, T]`."""
        ...

    def block(self, scope: ModuleScope, hidden: Tensor, context: Context) -> Tensor:
        """One block, `[B, T, hidden]` to the same."""
        ...

    def head(self, task: Task) -> Head:
        """The head for that task.

        Raises:
            OracleUnavailable: the family has none for it.
        """
        ...

    def pooled_column(self, input_ids: Tensor) -> Tensor:
        """Which column a sequence classifier reads in each row, `[B]` int64."""
        ...


@runtime_checkable
class Scaled(Protocol):
    """A definition whose rotary embedding a config can scale; one without this has the plain frequencies."""

    def rotary(self, length: int | None = None) -> RotaryTable:
        """Frequencies and attention factor of a sequence of that length, None for a short one."""
        ...

    @property
    def rotary_boundary(self) -> int | None:
        """The longest sequence that has the table of short ones; None where the length changes nothing."""
        ...


def rotary_of(oracle: Oracle, length: int | None = None) -> RotaryTable:
    """What the definition's rotary embedding computes with in a sequence of that length, None for a short one."""
    return oracle.rotary(length) if isinstance(oracle, Scaled) else RotaryTable.plain(oracle.inv_freq())


def rotary_boundary_of(oracle: Oracle) -> int | None:
    """See :attr:`Scaled.rotary_boundary`."""
    return oracle.rotary_boundary if isinstance(oracle, Scaled) else None
