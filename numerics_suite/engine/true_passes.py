"""True fp64 passes shared by cells of a run whose models hold equal numbers and compute the same with them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field
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

MOST_KEPT: Final = 3
"""Stores that are kept, all of one subject: one for each of a few attentions."""


@dataclass(slots=True)
class TrueStore:
    """The true fp64 passes of one set of numbers under one attention.

    Attributes:
        answers: of forward passes.
        runs: other results of passes, by name; for a model whose gradients are few enough to be kept.
        probe: result of the first cell's short pass; None if no other cell may share the store.
    """

    answers: PassStore = field(default_factory=PassStore)
    runs: dict[Any, Any] = field(default_factory=dict)
    probe: Fp64Run | None = None


class TruePasses:
    """The stores of a process's cells.

    A pass in true float64 depends on the parameters and buffers and not on the precision that they are stored in,
    unless the class depends on it: Gemma's normaliser is a constant in the model's own dtype. So equal numbers are not
    enough, and a short pass of both cells must agree to 1e-10, forward and backward. Passes of another attention are
    never shared, or a wrong mask would be compared with itself.
    """

    def __init__(self) -> None:
        """Nothing has run yet."""
        self._stores: OrderedDict[tuple[str, ...], TrueStore] = OrderedDict()

    def of(self, context: CellContext) -> TrueStore:
        """The store of a cell: an earlier cell's where both are the same in true fp64, else one of its own."""
        if not context.takes_ids or context.broken or context.changes:
            return TrueStore()
        cell = context.cell
        key = (cell.subject, cell.task, cell.attn, cell.device, digest_of_numbers(context.model))
        probe = _probe(context)
        if probe is None:
            return TrueStore()
        found = self._stores.get(key)
        if found is not None and found.probe is not None and _agree(found.probe, probe):
            self._stores.move_to_end(key)
            return found
        for other in [other for other in self._stores if other[0] != cell.subject]:
            del self._stores[other]  # all cells of a subject run in a row
        store = self._stores[key] = TrueStore(probe=probe)
        while len(self._stores) > MOST_KEPT:
            self._stores.popitem(last=False)
        return store


def keeps_gradients(model: nn.Module) -> bool:
    """Whether all float64 gradients of the model are small beside the cached outputs."""
    return 8 * sum(parameter.numel() for parameter in model.parameters()) <= KEPT_BYTES // 8


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
    return None if run.left_out or "logits" not in run.outputs else run


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
