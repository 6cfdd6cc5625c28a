"""True fp64 passes shared by cells of a run whose models hold equal numbers and compute the same with them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from numerics_suite.core.exact import AGREED
from numerics_suite.devices import random_state
from numerics_suite.engine.pass_store import PassStore
from numerics_suite.inputs.strategies import training_batch
from numerics_suite.observations.roundoff import gradient_errors, relative_error
from numerics_suite.subjects.memory import KEPT_BYTES

if TYPE_CHECKING:
    from numerics_suite.engine.cell_context import CellContext
    from numerics_suite.engine.true_fp64 import Fp64Run

PROBE: Final = (2, 5)
"""Rows and tokens of the short pass in which two cells must agree before one reads the other's passes."""

PIECE: Final = 1 << 22
"""Elements of a tensor that are digested at a time."""

MOST_KEPT: Final = 4
"""Stores that are kept, all of one subject: two attentions, of parameters as stored and of rounded ones."""

SHARED_BYTES: Final = 2 * KEPT_BYTES
"""Of the answers that later cells read; a run of one cell keeps fewer."""


@dataclass(frozen=True, slots=True)
class Form:
    """What two attentions must agree in before one reads the other's passes.

    Attributes:
        kind: of the call: passes of one kind take the same way through the masks of an attention.
        real: `[rows, tokens]`, which tokens are no padding; None where all answers count.
    """

    kind: Hashable
    real: Tensor | None = None


@dataclass(slots=True, eq=False)
class TrueStore:
    """The true fp64 passes of one set of numbers under one attention.

    Attributes:
        answers: of forward passes.
        runs: other results of passes, by name.
        probe: result of the first cell's short pass; None if no other cell may share the store.
        others: the stores of the same numbers, this one too, by attention.
        first: the store of another attention whose passes are read here too; None where they must not be.
        agreed: kinds of passes that gave the same under both attentions.
        read_other: whether a pass of the other attention was read.
    """

    answers: PassStore = field(default_factory=PassStore)
    runs: dict[Any, Any] = field(default_factory=dict)
    probe: Fp64Run | None = None
    others: dict[str, TrueStore] = field(default_factory=dict)
    first: TrueStore | None = None
    agreed: set[Hashable] = field(default_factory=set)
    read_other: bool = False

    def read(
        self,
        key: Hashable,
        form: Form,
        compute: Callable[[], Tensor],
        *,
        lasting: bool = False,
        own: bool = False,
    ) -> Tensor:
        """The answer of a forward pass, float64 on the CPU.

        One of the other attention stands in for it once a pass of the same kind gave the same under both.

        Args:
            key: of the pass.
            form: of its call.
            compute: runs it, if it is not there.
            lasting: many checks ask for it.
            own: under this attention, whatever the other one gave.
        """
        there = self.first if self.first is not None and key in self.first.answers else None
        agreed = form.kind in self.agreed
        if there is not None and agreed and not own and key not in self.answers:
            self.read_other = True
            return there.answers.read(key, compute, lasting=lasting)
        answer = self.answers.read(key, compute, lasting=lasting)
        if there is not None and not agreed:
            self._compare(form, answer, there.answers.read(key, compute, lasting=lasting))
        return answer

    def run(self, name: Hashable, compute: Callable[[], Any], agree: Callable[[Any, Any], bool] | None = None) -> Any:
        """Another result of passes; that of the other attention where it may stand in for it.

        Args:
            name: of what is run.
            compute: runs it, if it is not there.
            agree: compares two results. A result that is compared is computed under both attentions, and every other one once these
                have agreed.
        """
        if name in self.runs:
            return self.runs[name]
        there = self.first.runs.get(name) if self.first is not None else None
        if there is not None and (name in self.agreed or (agree is None and _GRADIENTS in self.agreed)):
            self.read_other = True
            return there
        found = compute()
        if there is not None and agree is not None:
            if agree(found, there):
                self.agreed |= {name, _GRADIENTS}
                found = there  # one of the two stays in memory
            else:
                self.apart()
        self.runs[name] = found
        return found

    def _compare(self, form: Form, answer: Tensor, other: Tensor) -> None:
        alike = answer.shape == other.shape
        if alike and relative_error(_at(answer, form.real), _at(other, form.real)) <= AGREED:
            self.agreed.add(form.kind)
        else:
            self.apart()

    def apart(self) -> bool:
        """Read no pass of the other attention any more; whether one was read before."""
        read, self.first, self.read_other = self.read_other, None, False
        self.agreed.clear()
        return read


_GRADIENTS: Final = "gradients"
"""The kind of backward passes: one over the gradient batch, compared in every parameter, speaks for all."""


class TruePasses:
    """The stores of a process's cells.

    A pass in true float64 depends on the parameters and buffers and not on the precision that they are stored in,
    unless the class depends on it: Gemma's normaliser is a constant in the model's own dtype. So equal numbers are not
    enough, and a short pass of both cells must agree to 1e-10, forward and backward. Two attentions share a pass only
    where one of its kind was run under both and agreed, or a wrong mask would be compared with itself.
    """

    def __init__(self) -> None:
        """Nothing has run yet."""
        self._stores: OrderedDict[tuple[str, ...], TrueStore] = OrderedDict()

    def of(self, context: CellContext) -> TrueStore:
        """The store of a cell: an earlier cell's where both are the same in true fp64, else one of its own."""
        if not context.takes_ids or context.broken or context.changes:
            return TrueStore()
        cell = context.cell
        numbers = (cell.subject, cell.task, cell.device, digest_of_numbers(context.model))
        probe = _probe(context)
        if probe is None:
            return TrueStore()
        key = (*numbers, cell.attn)
        found = self._stores.get(key)
        if found is not None and found.probe is not None and _agree(found.probe, probe):
            self._stores.move_to_end(key)
            return found
        for other in [other for other in self._stores if other[0] != cell.subject]:
            self._let_go(other)  # all cells of a subject run in a row
        store = self._stores[key] = self._new(numbers, cell.attn, probe)
        while len(self._stores) > MOST_KEPT:
            self._let_go(next(iter(self._stores)))
        return store

    def _let_go(self, key: tuple[str, ...]) -> None:
        """Drop a store. Those of equal numbers name each other, and no collection looks at what lived between two cells."""
        dropped = self._stores.pop(key)
        if all(store.others is not dropped.others for store in self._stores.values()):
            dropped.others.clear()

    def _new(self, numbers: tuple[str, ...], attn: str, probe: Fp64Run) -> TrueStore:
        """A store beside that of another attention of the same numbers; alone where there is none, or the two differ."""
        for key, other in self._stores.items():
            if key[:-1] == numbers and other.first is None and other.probe is not None and _agree(other.probe, probe):
                store = other.others.setdefault(attn, TrueStore(answers=PassStore(SHARED_BYTES)))
                store.probe, store.others, store.first = probe, other.others, other
                return store
        store = TrueStore(answers=PassStore(SHARED_BYTES), probe=probe)
        store.others[attn] = store
        return store

    def drop(self, name: str, but: TrueStore | None = None) -> None:
        """Let go every result whose name begins so.

        Args:
            name: of results.
            but: the stores of the same numbers as this one keep theirs.
        """
        for store in self._stores.values():
            if but is None or store.others is not but.others:
                for held in [held for held in store.runs if str(held).startswith(name)]:
                    del store.runs[held]


def leave_other_attention(context: CellContext) -> bool:
    """Whether a true fp64 pass of another attention stood in for one of the cell; from now on none does."""
    store = context.__dict__.get("true_passes")
    return isinstance(store, TrueStore) and store.apart()


def beside(store: TrueStore, attn: str) -> TrueStore:
    """The store of another attention of the same numbers, in which its passes are found by a cell to come.

    Args:
        store: of a cell.
        attn: the other attention.
    """
    return store.others.setdefault(attn, TrueStore(answers=PassStore(SHARED_BYTES)))


def gradient_bytes(model: nn.Module) -> int:
    """Of all gradients of the model in float64."""
    return 8 * sum(parameter.numel() for parameter in model.parameters())


def keeps_gradients(model: nn.Module) -> bool:
    """Whether these are small beside the cached outputs."""
    return gradient_bytes(model) <= KEPT_BYTES // 8


def digest_of_numbers(model: nn.Module) -> str:
    """SHA-256 over the values of parameters and buffers by name, independent of their dtype."""
    found = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        for piece in tensor.detach().contiguous().reshape(-1).split(PIECE):  # type: ignore[no-untyped-call]  # a float32 copy of a whole head is large
            values = piece.cpu()
            if values.is_floating_point() and values.dtype != torch.float64:
                values = values.float()  # holds every number of a narrower float
            found.update(values.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _probe(context: CellContext) -> Fp64Run | None:
    """The short pass of a cell; None if it raises, which a check reports."""
    rows, length = PROBE
    space, seed = context.space, context.request.seed
    tensors = training_batch(space, rows=min(rows, space.max_rows), length=min(length, context.longest), seed=seed)
    try:
        with random_state.torch_seeded(seed):  # no check's numbers depend on whether the probe ran before it
            run = context.runner.true_fp64(tensors.tensors, gradients=keeps_gradients(context.model))
    except Exception:  # noqa: BLE001 - the model's own code may raise anything
        return None
    if run.left_out or "logits" not in run.outputs:
        return None
    real = tensors.tensors["attention_mask"].bool()
    return replace(run, outputs={name: _at(value.cpu(), real) for name, value in run.outputs.items()})


def _at(answer: Tensor, real: Tensor | None) -> Tensor:
    """The answers of tokens; those of padding no definition fixes, and attentions differ in them."""
    return answer if real is None or answer.shape[:2] != real.shape else answer[real]


def _agree(one: Fp64Run, other: Fp64Run) -> bool:
    gradients = one.gradients or {}, other.gradients or {}
    if gradients[0].keys() != gradients[1].keys() or one.outputs.keys() != other.outputs.keys():
        return False
    errors = [
        relative_error(value, one.outputs[name]) for name, value in other.outputs.items() if _same(value, one, name)
    ]
    errors += gradient_errors(gradients[1], gradients[0]).values()
    return len(errors) == len(one.outputs) + len(gradients[0]) and all(error <= AGREED for error in errors)


def _same(value: Tensor, run: Fp64Run, name: str) -> bool:
    return value.shape == run.outputs[name].shape
