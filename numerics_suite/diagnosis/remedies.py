"""Each remedy of the contract, written once: the context under cured conditions, of a cell, a factory or a step that the watch caught.

A cure yields attempts, cheapest for the user first; the first that works is reported. It raises NotApplicableError where
the reason why it cannot be tried is worth telling. A remedy without an entry here cannot be tried on this machine (`reload-weights`
needs another copy of the files).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.deprecation import renamed
from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Finding
from numerics_suite.devices.random_state import seeded
from numerics_suite.diagnosis import tokenizer_remedies, update_remedies
from numerics_suite.diagnosis.config_fix import fixed_configs
from numerics_suite.diagnosis.loading_cures import cast_copies, loaded_with_dtype, saved_head
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.float32_modules import hold_in_float32
from numerics_suite.engine.own_batch import empty_batches_of
from numerics_suite.engine.packed_rows import WORDS, ways_of
from numerics_suite.inputs.labels import IGNORED, no_label_counts
from numerics_suite.subjects import compat
from numerics_suite.subjects.load import IDS, Loaded


@renamed(evidence="context")
@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One way to apply a remedy.

    Attributes:
        how: what was set, for the effect's text (`lr 1.2e-05`); empty where the remedy's name says it all.
        meant: the same model whose answers must match another definition than its own files', None for the same. Such an
            attempt says what the definition is, so it is verified only where the definition was asked and agrees.
    """

    context: CellContext
    how: str = ""
    meant: CellContext | None = None


Change = Callable[[Loaded], Loaded]
Cure = Callable[[CellContext, Finding], Iterator[Attempt]]

SCALES = (2.0**12, 2.0**8, 2.0**4, 1.0, 2.0**20, 2.0**24)
"""Loss scales tried besides torch's 65,536: lower ones where gradients overflow, then higher ones where they vanish."""

MASK = "attention_mask"
EXACT_IN_HALF = 256
"""Whole numbers up to this are the same in bfloat16."""

SAFE_EPS = 1e-4
"""An eps that float16 holds (its smallest normal number is 6e-5) and whose square root of v it still outweighs."""


def initialised(names: Iterable[str]) -> Change:
    """Xavier-uniform weights and zero biases for these parameters.

    Source: Glorot & Bengio 2010; the cure that GLM-4's users found for uninitialised heads.
    """
    chosen = tuple(names)

    def change(loaded: Loaded) -> Loaded:
        with seeded(0), torch.no_grad():
            for parameter in map(loaded.model.get_parameter, chosen):
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.zeros_(parameter)
        return loaded

    return change


def initialised_head(context: CellContext) -> CellContext | None:
    """The cell with its new head initialised, None without one; of a factory's module, what is uninitialised counts as that."""
    new = context.loaded.new_head
    names = new or (context.unwritten if context.subject.path is None else ())
    initialise = initialised(names)

    def change(loaded: Loaded) -> Loaded:
        # A head that was saved is not made anew when it is loaded again: its values are those of the file.
        return loaded if new and not loaded.new_head else initialise(loaded)

    return context.variant(change=change) if names else None


def _init_head(context: CellContext, _: Finding) -> Iterator[Attempt]:
    if (written := initialised_head(context)) is not None:
        yield Attempt(context=written)


def _clip(context: CellContext, _: Finding) -> Iterator[Attempt]:
    norm = context.request.plan.max_grad_norm
    if norm is not None and norm <= 1.0:
        reason = f"does not apply: the loop clips the gradient norm to {norm:g} already"
        raise NotApplicableError(reason)
    yield Attempt(context=context.variant(plan=context.with_plan(max_grad_norm=1.0)))


def _larger_eps(context: CellContext, _: Finding) -> Iterator[Attempt]:
    if context.request.plan.optimizer != "sgd":
        yield Attempt(context=context.variant(plan=context.with_plan(eps=SAFE_EPS)), how=f"eps {SAFE_EPS:g}")


def _loss_scale(context: CellContext, _: Finding) -> Iterator[Attempt]:
    if context.recipe.loss_scaling:
        for scale in SCALES:
            yield Attempt(context=context.variant(plan=context.with_plan(init_scale=scale)), how=f"scale {scale:g}")


def _amp_bf16(context: CellContext, _: Finding) -> Iterator[Attempt]:
    """Where less than float32 is at work: bfloat16 has float32's range, and no more than that."""
    narrow = {context.recipe.parameters, context.recipe.computes_in} & {"float16", "bfloat16"}
    if narrow and context.cell.precision != "amp-bf16":
        yield Attempt(context=context.variant(precision_name="amp-bf16"), how="in amp-bf16")


def _without_amp(context: CellContext, _: Finding) -> Iterator[Attempt]:
    if context.recipe.autocast is not None:
        yield Attempt(context=context.variant(precision_name="fp32"), how="in fp32")


def _attention(name: str) -> Cure:
    def cure(context: CellContext, _: Finding) -> Iterator[Attempt]:
        if not compat.is_language_model(context.model) or name == context.loaded.attn:
            return
        if context.subject.task != "module":
            yield Attempt(context=context.variant(attn=name))
            return

        def change(loaded: Loaded) -> Loaded:
            compat.set_attention(loaded.model, name)
            return loaded

        yield Attempt(context=context.variant(change=change))

    return cure


def _keep_in_fp32(context: CellContext, finding: Finding) -> Iterator[Attempt]:
    """The module of the finding, its likes in the other blocks, then those that hold it.

    A value that leaves the range in one block usually does in the next, and one that a module returns is out of range
    one level up.
    """
    if context.recipe.computes_in == "float64" or finding.module is None:
        return
    for names, how in worth_widening(context.model, finding.module):
        yield Attempt(context=context.variant(change=in_float32(*names)), how=how)


def worth_widening(model: nn.Module, module: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The module, its likes in the other blocks, then those that hold it: names, and the same in words."""
    known = dict(model.named_modules())
    name = module
    while name:
        # A list of modules is never called itself, so nothing would cast what goes into its members.
        if name in known and not isinstance(known[name], (nn.ModuleList, nn.ModuleDict)):
            yield (name,), f"{name} in float32"
            leaf = name.rpartition(".")[2]
            alike = tuple(
                other
                for other, each in known.items()
                if type(each) is type(known[name]) and other.rpartition(".")[2] == leaf
            )
            if len(alike) > 1 and not leaf.isdigit():
                yield alike, f"every {leaf} ({len(alike)}) in float32"
        name = name.rpartition(".")[0]


def in_float32(*names: str) -> Change:
    """Hold modules in float32, autocast off within them; their outputs go back to the dtype that came in."""

    def change(loaded: Loaded) -> Loaded:
        for name in names:
            hold_in_float32(loaded.model.get_submodule(name))
        return loaded

    return change


@dataclass(frozen=True, slots=True, kw_only=True)
class InputChange:
    """A change of what a module is called with: of a factory's own batch, and of every call that the watch kept.

    Attributes:
        of: makes other tensors of those by name.
    """

    of: Callable[[Mapping[str, Any]], dict[str, Any]]

    def __call__(self, loaded: Loaded) -> Loaded:
        """As a change of what is loaded."""
        return loaded if loaded.batch is None else replace(loaded, batch=self.of(loaded.batch))


LONGER = (2, 4, 8, 16)
"""Times the length to which rows are cut, until a label counts."""


def _count_labels(context: CellContext, _: Finding) -> Iterator[Attempt]:
    """Rows long enough for what follows the prompt; of a batch whose text is not at hand, its tokens as labels."""
    if context.request.data is None:
        every = InputChange(of=_every_token_counts)
        yield Attempt(context=context.variant(change=every), how="with every real token of the batch as a label")
        return
    length = context.request.length
    for longer in (length * times for times in LONGER if length * times <= context.longest):
        cured = context.variant(length=longer)
        batch = cured.usable_own_batch
        if batch is not None and empty_batches_of(cured, batch) < 1:
            yield Attempt(context=cured, how=f"rows of up to {longer} tokens (--seq-len {longer})")
            return
    reason = f"not tried: in rows of up to {length * LONGER[-1]} tokens, or as many as the model takes, batches without a label that counts remain"
    raise NotApplicableError(reason)


def _every_token_counts(tensors: Mapping[str, Any]) -> dict[str, Any]:
    ids, labels, mask = (tensors.get(name) for name in ("input_ids", "labels", MASK))
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.shape != labels.shape:
        return dict(tensors)
    if not no_label_counts(tensors, shifted=True):
        return dict(tensors)
    real = torch.ones_like(ids, dtype=torch.bool) if not isinstance(mask, Tensor) else mask.bool()
    counted = ids.masked_fill(~real, IGNORED)
    # Trainer hands over by how many labels the sum of the step's losses is divided.
    items = {"num_items_in_batch": (counted[:, 1:] != IGNORED).sum()} if "num_items_in_batch" in tensors else {}
    return {**tensors, "labels": counted, **items}


def _one_side(context: CellContext, finding: Finding) -> Iterator[Attempt]:
    """Every row with its padding on one side: behind the tokens no query is left without a key."""
    if finding.evidence.get("measurement") == "padding-moves":
        for cured, how in tokenizer_remedies.other_side(context):
            yield Attempt(context=cured, how=how)
        return
    own = context.loaded.batch
    if own is None and len(context.family.padding_sides) > 1:
        for side in context.family.padding_sides:
            variant = context.variant()
            variant.family = replace(context.family, padding_sides=(side,))
            yield Attempt(context=variant, how=f"padding on the {side} only")
        return
    mask = None if own is None else own.get(MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    for side in ("right", "left"):
        moved = InputChange(of=lambda tensors, side=side: _padded(tensors, side))  # type: ignore[misc]
        yield Attempt(context=context.variant(change=moved), how=f"padding on the {side} only")


def _padded(tensors: Mapping[str, Any], side: str) -> dict[str, Any]:
    mask = tensors.get(MASK)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return dict(tensors)
    order = torch.argsort((mask == 0).int() if side == "right" else (mask != 0).int(), dim=1, stable=True)

    def moved(value: object) -> object:
        return value.gather(1, order) if isinstance(value, Tensor) and value.shape == mask.shape else value

    return {name: moved(value) for name, value in tensors.items()}


def _default_dtypes(context: CellContext, _: Finding) -> Iterator[Attempt]:
    """The suite's own batches are int64, so a check that runs on them shows the cure; a batch that came with the model is cast back."""
    own = context.loaded.batch or {}
    floating = {n: v for n, v in own.items() if n in IDS and isinstance(v, Tensor) and v.is_floating_point()}
    half = (torch.bfloat16, torch.float16)
    lost = any(v.dtype in half and bool((v > EXACT_IN_HALF).any()) for v in floating.values())
    if floating and not lost:
        whole = InputChange(of=lambda tensors: {n: v.long() if n in floating else v for n, v in tensors.items()})
        how = "ids and masks in int64" if MASK in floating else "ids in int64"
        yield Attempt(context=context.variant(change=whole), how=how)
    elif context.takes_ids:
        yield Attempt(context=context.variant(), how="ids and masks in int64")
    elif lost:
        reason = "cannot be tried: the ids were rounded before they came here, and which were meant is lost"
        raise NotApplicableError(reason)


def _config(context: CellContext, finding: Finding) -> Iterator[Attempt]:
    for fixed in fixed_configs(context, finding):
        yield Attempt(context=fixed.context, how=fixed.how, meant=fixed.meant)


def _separate_rows(context: CellContext, finding: Finding) -> Iterator[Attempt]:
    """The other ways to pack that the model supports, then no packing."""
    failing = finding.evidence.get("packed by")
    for way in (*ways_of(context).asked, "rows"):
        if WORDS[way] != failing:
            yield Attempt(context=context.variant(packing=(way,)), how=f"by {WORDS[way]}")


def _copies(copies: Callable[[CellContext, Finding], Iterable[tuple[CellContext, str]]]) -> Cure:
    return lambda context, finding: (Attempt(context=copy, how=how) for copy, how in copies(context, finding))


CURES: dict[str, Cure] = {
    "init-head": _init_head,
    "default-input-dtypes": _default_dtypes,
    "fix-tokenizer": _copies(tokenizer_remedies.mended),
    "set-pad-token": _copies(lambda context, _: tokenizer_remedies.pad_token(context)),
    "separate-rows": _separate_rows,
    "fix-padding": _one_side,
    "count-labels": _count_labels,
    "fix-config": _config,
    "cast-after-loading": _copies(cast_copies),
    "load-with-dtype": _copies(loaded_with_dtype),
    "save-head": _copies(saved_head),
    "rebuild-optimizer": _copies(lambda context, _: update_remedies.rebuilt_optimizer(context)),
    "non-reentrant-checkpointing": _copies(lambda context, _: update_remedies.non_reentrant(context)),
    "clip-grad-norm": _clip,
    "larger-optimizer-eps": _larger_eps,
    "tune-loss-scale": _loss_scale,
    "raise-learning-rate": _copies(lambda context, _: update_remedies.higher_rates(context)),
    "stochastic-rounding": _copies(lambda context, _: update_remedies.rounded(context, "stochastic")),
    "eager-attention": _attention("eager"),
    "sdpa-attention": _attention("sdpa"),
    "use-amp-bf16": _amp_bf16,
    "keep-in-fp32": _keep_in_fp32,
    "fp32-master-weights": _copies(lambda context, _: update_remedies.rounded(context, "master")),
    "disable-amp": _without_amp,
}
"""By remedy, in the order of what they cost the user: a line of code, a setting, speed, memory."""
