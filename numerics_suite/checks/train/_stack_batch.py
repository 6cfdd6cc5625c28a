"""The subject of `train.trainer`: a small model of the subject's class, and rows with unequal numbers of labels."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.devices.kinds import CPU
from numerics_suite.engine.calls import call_model
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.engine.shallow_copy import blocks_beyond, shallow_copy
from numerics_suite.inputs.labels import IGNORED, labels_in_mean
from numerics_suite.inputs.strategies import build_batch
from numerics_suite.inputs.vocabulary import InputSpace
from numerics_suite.subjects.built_model import without_adapter
from numerics_suite.subjects.quiet import quiet_transformers

MOST_ROWS = 4
"""Micro-batches of one row each: enough to distinguish a mean of means, and a sum of means, from the mean."""

LONGEST_ROW = 10
"""Tokens of the longest row; each further row has two fewer."""

MOST_BLOCKS = 2
"""How the Trainer counts, divides and clips does not depend on how many blocks made the loss; two also show that one feeds the next."""

MOST_WORDS = 1024
"""Of a vocabulary, what is kept: most parameters of two blocks stand in it, and each way to train takes a gradient of all of them."""

MOST_BYTES = 1 << 30
"""A model whose float64 parameters take more bytes is not run here; gradients and references take four times that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSubject:
    """A model and its batch.

    Attributes:
        model: a copy of the subject's model on the CPU, of its first two blocks and words.
        task: of the subject.
        tensors: the whole batch; no row's first token counts, as with rows that begin with a prompt.
        from_the_first: labels with which the first token of a row that has no padding before it counts too.
    """

    model: nn.Module
    task: str
    tensors: Mapping[str, Tensor]
    from_the_first: Tensor

    @property
    def plain(self) -> nn.Module:
        """The model without peft's wrapper."""
        return without_adapter(self.model)

    @property
    def adapted(self) -> bool:
        """The subject has an adapter itself."""
        return hasattr(self.model, "peft_config")

    @property
    def counted(self) -> int:
        """Number of labels in the mean."""
        return labels_in_mean(self.tensors["labels"], self.task)

    def rows(self, tensors: Mapping[str, Tensor] | None = None) -> list[dict[str, Tensor]]:
        """The batch as the items of a dataset: a dict for each row."""
        given = self.tensors if tensors is None else tensors
        return [{name: value[row] for name, value in given.items()} for row in range(len(given["input_ids"]))]

    def unpadded(self) -> list[dict[str, list[int]]]:
        """The rows without padding and mask, as padding-free collators expect them."""
        mask = self.tensors["attention_mask"].bool()
        names = ("input_ids", "labels")
        return [{name: self.tensors[name][row][mask[row]].tolist() for name in names} for row in range(len(mask))]

    def packed(self) -> dict[str, Tensor]:
        """All rows in one, without padding; positions restart with each row, whose first token is no label."""
        rows = self.unpadded()
        ids = [token for row in rows for token in row["input_ids"]]
        labels = [label for row in rows for label in (IGNORED, *row["labels"][1:])]
        positions = [place for row in rows for place in range(len(row["input_ids"]))]
        named = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.tensor([values]) for name, values in named.items()}


def stack_of(context: CellContext) -> StackSubject:
    """The subject's model and a batch for it.

    Raises:
        NotApplicableError: the Trainer cannot be checked with it.
    """
    if importlib.util.find_spec("accelerate") is None:
        reason = "transformers' Trainer needs accelerate: pip install 'numerics-suite[accelerate]'"
        raise NotApplicableError(reason)
    _refuse_unsuited(context)
    space = context.space
    rows = min(MOST_ROWS, context.rows)
    if rows < 2:
        reason = "one row cannot be cut into micro-batches"
        raise NotApplicableError(f"{reason} (--batch-size 1)" if context.request.rows == 1 else reason)
    longest = min(LONGEST_ROW, space.max_length)
    lengths = [max(longest - 2 * row, min(3, longest)) for row in range(rows)]

    def rows_in(words: InputSpace) -> dict[str, Any]:
        batch = build_batch(
            words,
            lengths=lengths,
            contents=["uniform"] * rows,
            side=space.sides[0],
            content_seed=context.request.seed % 2**32,
            pad_inside=False,
        )
        return dict(batch.tensors)

    model, tensors = _copied(context, rows_in)
    _without_dropout(model)
    answers, whole = _labels(tensors, context.subject.task)
    return StackSubject(
        model=model, task=context.subject.task, tensors={**tensors, "labels": answers}, from_the_first=whole
    )


def _copied(context: CellContext, rows_in: Callable[[InputSpace], dict[str, Any]]) -> tuple[nn.Module, dict[str, Any]]:
    """The subject's model on the CPU with its first blocks and words, or with all where its class does not run with fewer; and rows for it.

    Args:
        context: the cell.
        rows_in: draws the rows from a vocabulary.

    Raises:
        NotApplicableError: it is too large.
    """
    space = context.space
    few = replace(space, vocab_size=MOST_WORDS, special_ids=()) if _spares_words(space) else space
    with context.modified_model() as model:
        beyond = blocks_beyond(model, MOST_BLOCKS)
        _refuse_large(model, beyond)
        for words in dict.fromkeys((few, space)):
            if words is space and not beyond:
                break
            shallow, tensors = shallow_copy(model, MOST_BLOCKS).to(CPU), rows_in(words)
            with suppress(Exception):  # code that reaches for a certain block or word may raise anything
                if words is not space:
                    _keep_words(shallow, words.vocab_size)
                with torch.no_grad():
                    call_model(shallow, tensors)
                return shallow, tensors
        _refuse_large(model)
        return context.copy_model().to(CPU), rows_in(space)


def _spares_words(space: InputSpace) -> bool:
    """Whether fewer words do: how the Trainer counts, divides and clips does not depend on how many there are.

    The pad id by which a classifier finds a row's last token stays what it is.
    """
    return space.vocab_size > MOST_WORDS > space.pad_id


def _keep_words(model: nn.Module, count: int) -> None:
    """Leave the first rows of the embedding and of the output layer.

    Raises:
        ValueError: the class keeps another number.
    """
    resized: Any = without_adapter(model)
    with quiet_transformers():
        embedding = resized.resize_token_embeddings(count)
    output = resized.get_output_embeddings()
    if {count} != {len(each.weight) for each in (embedding, output) if each is not None}:
        reason = "another number of words is left"
        raise ValueError(reason)


def _refuse_unsuited(context: CellContext) -> None:
    from transformers import PreTrainedModel  # heavy

    inner = without_adapter(context.model)
    if not isinstance(inner, PreTrainedModel):
        reason = f"transformers' Trainer is checked with models of transformers only, and {type(inner).__name__} is no PreTrainedModel"
        raise NotApplicableError(reason)
    if "," in context.cell.device:
        reason = "the installed packages are judged on one device: name one"
        raise NotApplicableError(reason)


def _refuse_large(model: nn.Module, beyond: Sequence[str] = ()) -> None:
    without = tuple(f"{name}." for name in beyond)
    needed = 8 * sum(each.numel() for name, each in model.named_parameters() if not name.startswith(without))
    if needed > MOST_BYTES:
        reason = (
            f"{needed / 2**30:.1f} GiB of parameters in float64; the installed packages are judged as well on a small checkpoint "
            f"of the class {type(without_adapter(model)).__name__}"
        )
        raise NotApplicableError(reason)


def _without_dropout(model: nn.Module) -> None:
    """Every probability at zero, in modules and in the config that they read.

    A dispatch or function mode does not reach what checkpointing recomputes within the backward pass; a dropout of zero is the identity
    there too.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):  # noqa: SLF001 - the base of all
            module.p = 0.0
        for owner in (module, getattr(module, "config", None)):
            held = vars(owner) if hasattr(owner, "__dict__") else {}
            held.update({name: 0.0 for name, value in held.items() if isinstance(value, float) and "drop" in name})


def _labels(tensors: Mapping[str, Any], task: str) -> tuple[Tensor, Tensor]:
    """Labels that skip the prompt, and labels that count from the first token on; equal where nothing is shifted."""
    labels, ids = tensors["labels"], tensors["input_ids"]
    if task == "sequence-classification":
        return labels, labels
    real = tensors["attention_mask"].bool()
    if task == "token-classification":
        every = torch.where(real, torch.where(labels == IGNORED, torch.zeros_like(labels), labels), IGNORED)
        return every, every
    first = real & (real.cumsum(dim=1) == 1)
    answers = torch.where(real & ~first, ids, IGNORED)
    # What follows padding would be predicted from it; only in the first column does a label have no prediction at all.
    whole = answers.clone()
    whole[:, 0] = torch.where(real[:, 0], ids[:, 0], whole[:, 0])
    return answers, whole


def smoothed(stack: StackSubject, epsilon: float, *, shifted: bool) -> Any:
    """The loss with label smoothing by its definition: (1 - ε) of the label's surprisal and ε of the mean over all classes.

    Szegedy et al., "Rethinking the Inception Architecture for Computer Vision" (2016), section 7; the mean over the labels that count.

    Args:
        stack: its labels.
        epsilon: the share of the uniform distribution.
        shifted: the labels are those of the next token.

    Returns:
        a function of the model's output.
    """
    targets = stack.tensors["labels"]

    def loss(output: Any) -> Tensor:
        scores, wanted = output["logits"], targets
        if shifted:
            scores, wanted = scores[:, :-1], wanted[:, 1:]
        surprisal = -torch.log_softmax(scores.reshape(-1, scores.shape[-1]), dim=-1)
        wanted = wanted.reshape(-1)
        kept = wanted != IGNORED
        surprisal, wanted = surprisal[kept], wanted[kept]
        own: Tensor = surprisal.gather(1, wanted.unsqueeze(1)).mean()
        return (1 - epsilon) * own + epsilon * surprisal.mean()

    return loss
