"""Runs a definition block by block: forward, and backward by recomputing one block at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from numerics_suite.definitions.config import OracleUnavailable
from numerics_suite.definitions.definition import Context, Head, rotary_of
from numerics_suite.definitions.loss import loss_of
from numerics_suite.definitions.parts import ModuleScope, RotaryTable, roundoffs_apart, visible_keys
from numerics_suite.definitions.trace import TURN
from numerics_suite.definitions.weights import tensor_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from torch import Tensor

    from numerics_suite.core.records import Task
    from numerics_suite.definitions.definition import Oracle
    from numerics_suite.definitions.weights import Rows, Weights

    Stage = Callable[[Tensor, Weights], Tensor]

ANSWER = "logits"
"""Key of a state that belongs to no module: the model's output after any pooling."""

CHUNK_ROWS = 8192
"""Rows of a head that are upcast at a time: 256 MiB in float64 at hidden size 4,096; the whole one is 4.6 GiB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleRun:
    """The results of a definition, all in float64.

    Attributes:
        logits: `[B, T, V]`, or `[B, K]` of the pooled column for sequence classification. Rows at padding are finite
            and mean nothing.
        loss: scalar, None without labels.
        states: by module path, in the order of computation; empty unless traced.
        gradients: of the loss, by weight name; empty unless requested. A tied weight has one, the embedding's.
    """

    logits: Tensor
    loss: Tensor | None = None
    states: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Overlay:
    """A new head's tensors over the checkpoint's: weights like any other."""

    head: Mapping[str, Tensor]
    below: Weights

    def __call__(self, name: str, rows: Rows = None) -> Tensor:
        """That weight, from the head where it has one of that name."""
        return self._of(name)(name, rows)

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole weight's shape."""
        return self._of(name).shape(name)

    def rounding(self) -> Hashable:
        """Of those below; a new head is taken as it stands."""
        return self.below.rounding()

    def _of(self, name: str) -> Weights:
        return tensor_weights(self.head) if name in self.head else self.below


@dataclass(frozen=True, slots=True)
class _Leaves:
    """Weights that record every read, as leaves of an autograd graph."""

    below: Weights
    read: list[tuple[str, Rows, Tensor]] = field(default_factory=list)

    def __call__(self, name: str, rows: Rows = None) -> Tensor:
        leaf = self.below(name, rows).requires_grad_()
        self.read.append((name, rows, leaf))
        return leaf

    def shape(self, name: str) -> tuple[int, ...]:
        return self.below.shape(name)

    def rounding(self) -> Hashable:
        return self.below.rounding()


def run_definition(  # noqa: PLR0913 - the arguments of `run_oracle`
    oracle: Oracle,
    config: Mapping[str, Any],
    weights: Weights,
    batch: Mapping[str, Tensor],
    *,
    task: Task,
    inv_freq: Tensor | None,
    rotary: str | None,
    gradients: bool,
    on_gradient: Callable[[str, Tensor], None] | None,
    trace: bool,
) -> OracleRun:
    """Run one definition on the CPU; the arguments are those of :func:`numerics_suite.definitions.run_oracle`."""
    batch = {name: tensor.detach().cpu() for name, tensor in batch.items()}
    states: dict[str, Tensor] = {}
    passes = _Passes(oracle=oracle, batch=batch, task=task, inv_freq=inv_freq, states=states if trace else None)
    if rotary is not None:
        passes.note(f"{rotary}{TURN}", passes.context.turn.squeeze(2))
    with torch.no_grad():
        inputs = passes.forward(weights, keep=gradients)
        logits = torch.cat([part(inputs[-1], weights) for part in passes.head_parts(weights)], dim=-1)
        passes.note_head(logits)
    labels = batch.get("labels")
    if labels is None:
        if gradients:
            message = "gradients need labels"
            raise ValueError(message)
        return OracleRun(logits=logits, states=states)
    loss = loss_of(task, config, logits.requires_grad_(gradients), labels)
    run = OracleRun(logits=logits.detach(), loss=loss.detach(), states=states)
    if gradients:
        (upstream,) = torch.autograd.grad(loss, [logits])
        passes.states = None  # the recomputation notes nothing twice
        passes.backward(weights, inputs, upstream, on_gradient or run.gradients.__setitem__)
    return run


@dataclass(slots=True, kw_only=True)
class _Passes:
    """The forward and the backward pass of one definition over one batch."""

    oracle: Oracle
    batch: Mapping[str, Tensor]
    task: Task
    inv_freq: Tensor | None
    states: dict[str, Tensor] | None
    context: Context = field(init=False)
    top: Head = field(init=False)

    def __post_init__(self) -> None:
        """Work out what every block shares."""
        self.top = self.oracle.head(self.task)
        ids, mask = self.batch["input_ids"], self.batch.get("attention_mask")
        if mask is not None and mask.shape != ids.shape:
            message = f"the oracle takes a mask of the ids' shape, not of {tuple(mask.shape)}"
            raise OracleUnavailable(message)
        positions = self.batch.get("position_ids")
        positions = self.oracle.positions(ids, mask) if positions is None else positions
        table = rotary_of(self.oracle, int(positions.max()) + 1)
        angles = positions.to(torch.float64)[..., None, None] * self._rates(table)
        turn = torch.polar(torch.full_like(angles, table.scale), angles)
        self.context = Context(turn=turn, visible=visible_keys(mask, *ids.shape))

    def _rates(self, exact: RotaryTable) -> Tensor:
        """The model's own rotary table if it is the exact one rounded; else the exact one."""
        if self.inv_freq is None or not roundoffs_apart(self.inv_freq, exact.inv_freq) <= exact.allowed:
            return exact.inv_freq
        return self.inv_freq.detach().to(exact.inv_freq)

    def note(self, name: str, value: Tensor) -> Tensor:
        """Keep a copy of `value` under that name if traced, and return it."""
        if self.states is not None:
            self.states[name] = value.detach().clone()
        return value

    def stages(self) -> list[Stage]:
        """Embedding, every block, last norm, pooling where there is one: each from its input to the next one's."""
        pooling = [self._pool] if self.task == "sequence-classification" else []
        return [self._embed, *(self._block(index) for index in range(self.oracle.depth)), self._norm, *pooling]

    def _embed(self, ids: Tensor, weights: Weights) -> Tensor:
        used, index = torch.unique(ids, return_inverse=True)
        table = weights(f"{self.oracle.embedding}.weight", used)
        if self.oracle.untrained_row is not None:
            table = torch.where((used == self.oracle.untrained_row)[:, None], table.detach(), table)
        return self.note(self.oracle.embedding, table[index])

    def _block(self, index: int) -> Stage:
        def stage(hidden: Tensor, weights: Weights) -> Tensor:
            scope = ModuleScope(path=f"{self.oracle.blocks}.{index}", weights=weights, note=self.note)
            return self.oracle.block(scope, hidden, self.context)

        return stage

    def _norm(self, hidden: Tensor, weights: Weights) -> Tensor:
        parent, _, name = self.oracle.norm.rpartition(".")
        return ModuleScope(path=parent, weights=weights, note=self.note).rms_norm(name, hidden, self.oracle.eps)

    def _pool(self, hidden: Tensor, weights: Weights) -> Tensor:
        if not self.top.sees_pooled_row:  # the head as a module gives every column, so that is its state
            self._note_every_column(hidden, weights)
        return hidden[torch.arange(len(hidden)), self.oracle.pooled_column(self.batch["input_ids"])]

    def _note_every_column(self, hidden: Tensor, weights: Weights) -> None:
        if self.states is not None:
            self.note(self.top.path, torch.cat([part(hidden, weights) for part in self.head_parts(weights)], dim=-1))

    def note_head(self, logits: Tensor) -> None:
        """Keep the head's output and the model's output as states."""
        if self.task != "sequence-classification" or self.top.sees_pooled_row:
            self.note(self.top.path, logits)
        self.note(ANSWER, logits)

    def head_parts(self, weights: Weights) -> list[Stage]:
        """The head in runs of rows, so that no more than `CHUNK_ROWS` of it are ever upcast."""

        def part(rows: slice) -> Stage:
            def stage(hidden: Tensor, weights: Weights) -> Tensor:
                offset = weights(self.top.bias, rows) if self.top.bias else None
                return functional.linear(hidden, weights(self.top.weight, rows), offset)

            return stage

        count = weights.shape(self.top.weight)[0]
        return [part(slice(start, min(start + CHUNK_ROWS, count))) for start in range(0, count, CHUNK_ROWS)]

    def forward(self, weights: Weights, *, keep: bool) -> list[Tensor]:
        """Run every stage below the head.

        Returns:
            The inputs of each stage and of the head if `keep`; else only the head's.
        """
        inputs = [self.batch["input_ids"]]
        for stage in self.stages():
            output = stage(inputs[-1], weights)
            inputs = [*inputs, output] if keep else [output]
        return inputs

    def backward(
        self, weights: Weights, inputs: list[Tensor], upstream: Tensor, take: Callable[[str, Tensor], None]
    ) -> None:
        """The chain rule from the logits down: a stage is recomputed with a graph of its own, which is then dropped."""
        sums: dict[str, Tensor] = {}
        pieces = zip(self.head_parts(weights), torch.split(upstream, CHUNK_ROWS, dim=-1), strict=True)
        below = torch.stack([_pull(part, inputs[-1], weights, piece, sums) for part, piece in pieces]).sum(0)
        shared = f"{self.oracle.embedding}.weight"  # a tied head adds to it before the embedding does
        for stage, given in zip(reversed(self.stages()), reversed(inputs[:-1]), strict=True):
            for name in [name for name in sums if name != shared]:
                take(name, sums.pop(name))
            below = _pull(stage, given, weights, below, sums)
        for name, gradient in sums.items():
            take(name, gradient)


def _pull(stage: Stage, given: Tensor, weights: Weights, upstream: Tensor, sums: dict[str, Tensor]) -> Tensor:
    """Gradient of one stage's input; those of its weights are added to `sums`, in the rows that were read."""
    leaves = _Leaves(weights)
    given = given.detach().requires_grad_(given.is_floating_point())
    with torch.enable_grad():
        output = stage(given, leaves)
    wanted = [leaf for _, _, leaf in leaves.read] + ([given] if given.requires_grad else [])
    found = torch.autograd.grad(output, wanted, upstream)
    for (name, rows, _), gradient in zip(leaves.read, found, strict=False):
        if rows is None and name not in sums:
            sums[name] = gradient
            continue
        if name not in sums:
            sums[name] = torch.zeros(weights.shape(name), dtype=torch.float64)
        sums[name][slice(None) if rows is None else rows] += gradient
    return found[-1]
