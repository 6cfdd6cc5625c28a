"""The context of a check: one cell's model and every result that checks share, each computed once.

The suite builds one :class:`CellContext` per cell. Experiments and remedies run on a :meth:`CellContext.variant`, so they
are written once: for a cell, a factory and a step that the watch caught.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor, nn

from numerics_suite.core.activity import doing
from numerics_suite.core.attributes import with_attribute
from numerics_suite.core.deprecation import renamed
from numerics_suite.core.errors import NotApplicableError, UnusableError
from numerics_suite.core.records import Batch, Cell, Subject
from numerics_suite.devices import random_state
from numerics_suite.devices.condition import Condition
from numerics_suite.devices.precisions import Precision, precision
from numerics_suite.engine import cell_batches, own_batch
from numerics_suite.engine.calls import takes_token_ids
from numerics_suite.engine.digests import batch_key
from numerics_suite.engine.outputs import floating_outputs
from numerics_suite.engine.pad_token import lacks_pad_token
from numerics_suite.engine.pass_store import PassStore
from numerics_suite.engine.request import Request
from numerics_suite.engine.rotary import reads_table, rotary_table
from numerics_suite.engine.runner import Runner
from numerics_suite.engine.training_copy import copy_sharing, trained_by
from numerics_suite.engine.training_loop import Trainer, TrainingPlan, Trajectory, trainer_of
from numerics_suite.engine.true_passes import TruePasses, TrueStore, keeps_gradients
from numerics_suite.inputs.effort import BatchPlan
from numerics_suite.inputs.vocabulary import InputSpace
from numerics_suite.observations.finiteness import nan_count, not_finite
from numerics_suite.subjects.families import family_of
from numerics_suite.subjects.families.family import Family
from numerics_suite.subjects.load import Loaded, load
from numerics_suite.subjects.memory import KEPT_BYTES
from numerics_suite.subjects.tasks import is_head
from numerics_suite.subjects.zeroed_memory import Zeroed

Result = TypeVar("Result")


@renamed(tampered="modified_model", let_go="release", memo="cache")
class CellContext:
    """One cell under test.

    Attributes:
        subject: the resolved subject.
        cell: where it runs.
        recipe: the precision recipe.
        request: batch shape, seed, training plan.
        family: the description of the architecture.
        shared: the true fp64 passes of the run's cells, None for a cell of its own.
        first_step: the number of the first step of its training runs.
        origin: where these begin, in words; empty for the model as loaded.
        unheld: parameters that are meant to train and that no optimizer of these holds.
        gradient_passes: true fp64 passes over the gradient batch of a large model, by name; dropped once no check reads them.
        cache: the answers of :meth:`cached`.
    """

    first_step, origin = 1, ""
    unheld: tuple[str, ...] = ()
    unusable: UnusableError | None = None  # why no model could be loaded of the files

    def __init__(
        self,
        subject: Subject,
        cell: Cell,
        request: Request,
        loader: Callable[..., Loaded] | None = None,
        *,
        shared: TruePasses | None = None,
    ) -> None:
        """Nothing is loaded until a check asks.

        `loader` replaces :func:`numerics_suite.subjects.load.load`, for models that a test changes; `shared` are the true
        fp64 passes of the run's earlier cells.
        """
        self.subject, self.cell, self.request = subject, cell, request
        self.recipe: Precision = precision(cell.precision)
        self.family: Family = family_of(subject.config)
        self._loader = loader or load
        self._forwards: OrderedDict[tuple[Any, ...], dict[str, Tensor]] = OrderedDict()
        self.passes, self.shared = PassStore(), shared
        self.gradient_passes: dict[str, Any] = {}
        self.cache: dict[Any, Any] = {}
        self.changes: tuple[Callable[[Loaded], Loaded], ...] = ()
        self.runs: dict[tuple[Any, ...], Trajectory] = {}

    def variant(
        self,
        *,
        subject: Subject | None = None,
        precision_name: str | None = None,
        attn: str | None = None,
        change: Callable[[Loaded], Loaded] | None = None,
        plan: TrainingPlan | None = None,
        **request: Any,
    ) -> CellContext:
        """A fresh context of the same subject under other conditions, on which a remedy or an experiment is tried.

        `subject` is the same one in other files, `change` applies to every model as soon as it is loaded, and `request` are
        more fields of the request to replace. It shares training runs with this one, so that an experiment and the remedy
        of the same name train once.
        """
        cell = replace(self.cell, precision=precision_name or self.cell.precision, attn=attn or self.cell.attn)
        asked = replace(self.request, plan=plan or self.request.plan, **request)
        variant = self._like(subject or self.subject, cell, asked)
        variant.changes = self.changes if change is None else (*self.changes, change)
        variant.runs = self.runs
        return variant

    def _like(self, subject: Subject, cell: Cell, request: Request) -> CellContext:
        return CellContext(subject, cell, request, loader=self._loader)

    def cached(self, compute: Callable[..., Result], *arguments: Any) -> Result:
        """What a function computes of this context and these arguments; once, until :meth:`release`."""
        key = (compute, *arguments)
        if key not in self.cache:
            self.cache[key] = compute(self, *arguments)
        found: Result = self.cache[key]
        return found

    # --- the model -------------------------------------------------------------------------------------------------

    def load(self, *, seed: int = 0, poison: bool = False, dtype: str | None = None, attn: str | None = None) -> Loaded:
        """A fresh model, in eval mode; dtype and attention are the cell's unless given."""
        dtype, attn, device = dtype or self.recipe.parameters, attn or self.cell.attn, self.cell.device
        with doing(f"loading {self.subject.id} in {dtype}"):
            loaded = self._loader(self.subject, dtype=dtype, attn=attn, device=device, seed=seed, poison=poison)
            for change in self.changes:
                loaded = change(loaded)
        return loaded

    @cached_property
    def loaded(self) -> Loaded:
        """The cell's model as loaded, shared by every check that does not change it.

        Loaded under poison, so that unwritten memory is NaN on every machine, instead of whatever it held before.
        """
        if self.unusable is None:
            try:
                return self.load(seed=self.request.seed, poison=True)
            except UnusableError as error:
                self.unusable = error
        raise self.unusable  # every check that asks meets the same one

    @cached_property
    def unwritten(self) -> tuple[str, ...]:
        """Names of the uninitialised parameters: NaN under poison, and NaN neither in the file nor by the code.

        A NaN that a factory's code writes is NaN over zeroed memory too; only for a head does it count.
        """
        bad = {name for name, p in self.model.named_parameters() if nan_count(p.detach())}
        if self.subject.path is not None:
            return tuple(sorted(bad & (set(self.loaded.new_head) | set(self.loaded.missing))))
        if not bad or is_head(bad):
            return tuple(sorted(bad))
        with Zeroed():  # type: ignore[no-untyped-call]
            plain = self.load(seed=self.request.seed).model
        return tuple(sorted(name for name in bad if not nan_count(plain.get_parameter(name).detach())))

    @cached_property
    def broken(self) -> tuple[str, ...]:
        """Names of the parameters that are not finite as loaded, and of the buffers with NaN (-inf is a mask)."""
        return not_finite(self.model)

    @property
    def model(self) -> nn.Module:
        """The cell's model, in eval mode; checks leave it as they found it."""
        return self.loaded.model

    @property
    def holds_large_model(self) -> bool:
        """Whether a model is in memory whose gradients are large beside the cached outputs; loads none."""
        held: Loaded | None = self.__dict__.get("loaded")
        return held is not None and not keeps_gradients(held.model)

    def copy_model(self, own: Callable[[nn.Module], Collection[nn.Parameter]] | None = None) -> nn.Module:
        """A copy of the cell's model that a check may train or change; see :func:`~numerics_suite.engine.training_copy.copy_sharing`."""
        return copy_sharing(self.model, own, device=self.cell.device)

    @contextmanager
    def modified_model(self) -> Iterator[nn.Module]:
        """The shared model, for a check that changes a switch and restores it; ignores cached forward passes."""
        with with_attribute(self, "_forwards", OrderedDict()):
            yield self.model

    def release(self) -> None:
        """Drop every cached result now: reference cycles would keep them until the garbage collector runs."""
        self._forwards.clear()
        self.passes.clear()
        self.__dict__.pop("true_passes", None)  # which other cells may still read
        self.gradient_passes.clear()
        self.cache.clear()

    # --- inputs ----------------------------------------------------------------------------------------------------

    @cached_property
    def takes_ids(self) -> bool:
        """Whether batches of token ids can be drawn for it; a plain module runs on its own batch only."""
        return takes_token_ids(self.model)

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the input embedding."""
        return int(self.model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]

    @cached_property
    def space(self) -> InputSpace:
        """What batches may be drawn."""
        return cell_batches.input_space(self)

    @cached_property
    def longest(self) -> int:
        """Most tokens of a row that config and position table allow, with one rotary table for all lengths."""
        return cell_batches.longest_row(self.model)

    @property
    def num_labels(self) -> int:
        """Classes of the head as built."""
        return int(getattr(getattr(self.model, "config", None), "num_labels", self.subject.num_labels))

    @cached_property
    def tokenizer(self) -> Any | None:
        """The subject's tokenizer, None without one.

        Raises:
            TokenizerRaisesError: it cannot be opened.
            NotApplicableError: a package that it needs is not installed, or its own code may not run.
        """
        return None if self.subject.path is None else self.request.tokenizer(self.subject)

    @cached_property
    def lacks_pad_token(self) -> bool:
        """Whether it is a classifier that takes only one row at a time, since it has no pad token."""
        return lacks_pad_token(self)

    @property
    def rows(self) -> int:
        """Rows of a batch, `--batch-size`; one for a classifier that cannot take more."""
        return 1 if self.lacks_pad_token else self.request.rows

    @cached_property
    def own_batch(self) -> Batch | None:
        """The batch that comes with the subject: a factory's, or the user's `--data`."""
        return own_batch.own_batch(self)

    @cached_property
    def usable_own_batch(self) -> Batch | None:
        """The subject's own batch where a model can take it."""
        return own_batch.usable(self, self.own_batch)

    @cached_property
    def training_batch(self) -> Batch:
        """The fixed batch that the cell trains on; the user's own where there is one with a label that counts."""
        return cell_batches.of_training(self)

    @cached_property
    def gradient_batch(self) -> Batch:
        """The batch over which gradients are compared in float64: the training batch, or one with fewer tokens of a large model."""
        return cell_batches.of_gradients(self)

    @cached_property
    def batch_plan(self) -> BatchPlan:
        """How many batches each check runs on, and their size."""
        return self.request.effort.plan(self.subject.parameters or sum(p.numel() for p in self.model.parameters()))

    @cached_property
    def planned_batches(self) -> tuple[Batch, ...]:
        """The batches that every check examines, so that their passes are shared; none where Hypothesis draws all of them."""
        return cell_batches.planned(self)

    # --- runs ------------------------------------------------------------------------------------------------------

    @property
    def condition(self) -> Condition:
        """Precision and device under which the cell runs."""
        return Condition(precision=self.recipe, device=self.cell.device)

    @cached_property
    def runner(self) -> Runner:
        """Runs the cell's model under the cell's condition."""
        return Runner(self.model, self.condition)

    def run(self, tensors: Mapping[str, Any], **keywords: Any) -> Any:
        """One forward pass without gradients under the cell's recipe; the raw output."""
        return self.runner.forward(tensors, **keywords)

    @cached_property
    def true_passes(self) -> TrueStore:
        """The true fp64 passes of the cell: an earlier cell's too, where both are the same in true fp64."""
        return TrueStore() if self.shared is None else self.shared.of(self)

    @cached_property
    def rotary_table(self) -> tuple[str, Tensor] | None:
        """Name and values of the rotary frequencies that the model reads, at the first call; None without any."""
        return rotary_table(self.model) if reads_table(self.model) else None

    def inputs_of(self, batch: Batch) -> dict[str, Any]:
        """The tensors of a batch that a forward pass receives."""
        return self.inputs_in(batch.tensors)

    def inputs_in(self, tensors: Mapping[str, Any]) -> dict[str, Any]:
        """The tensors that a forward pass receives: all but labels; a plain module gets its whole batch."""
        return {name: value for name, value in tensors.items() if name != "labels" or not self.takes_ids}

    def forward(self, batch: Batch, *, labels: bool = False) -> dict[str, Tensor]:
        """The floating outputs of the cell's model on the batch, by name; with its loss if it gets the `labels` too."""
        tensors = dict(batch.tensors) if labels else self.inputs_of(batch)
        key = batch_key(tensors)
        if key not in self._forwards:
            self._forwards[key] = floating_outputs(self.run(tensors))
            held = self._forwards.values()
            while len(held) > 1 and sum(tensor.nbytes for kept in held for tensor in kept.values()) > KEPT_BYTES:
                self._forwards.popitem(last=False)
        self._forwards.move_to_end(key)
        return self._forwards[key]

    @cached_property
    def trajectory(self) -> Trajectory:
        """The cell's watched training run, on a copy of its model and the fixed batch; once per set of conditions."""
        asked, sides = self.request, self.family.padding_sides
        conditions = (self.subject, self.cell, asked.plan, asked.seed, asked.rows, asked.length, sides, self.changes)
        if conditions not in self.runs:
            self.runs[conditions] = self.train(asked.plan)
        return self.runs[conditions]

    def train(self, plan: TrainingPlan, recipe: Precision | None = None) -> Trajectory:
        """Train a copy of the cell's model on the fixed batch, under another precision recipe than the cell's where one is given."""
        with random_state.seeded(self.request.seed):
            return self.trainer(plan, recipe).run()

    def trainer(self, plan: TrainingPlan, recipe: Precision | None = None) -> Trainer:
        """A training run that has not started; otherwise as :meth:`train`."""
        model = self.copy_model(own=lambda copied: trained_by(copied, plan.scope, self.family, self.cell.device))
        if not any(parameter.requires_grad for parameter in model.parameters()):
            reason = "no parameter of this model requires a gradient"
            raise NotApplicableError(reason)
        if self.recipe.parameters == "float64":
            model.double()  # what the class keeps in float32 cannot take a float64 gradient; widening rounds nothing
        condition = self.condition if recipe is None else replace(self.condition, precision=recipe)
        return trainer_of(model, self.training_batch.tensors, condition=condition, plan=plan)

    def with_plan(self, **changes: Any) -> TrainingPlan:
        """The request's plan with some fields changed."""
        return replace(self.request.plan, **changes)
