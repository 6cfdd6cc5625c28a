"""Hypothesis strategies for batches, masks and labels.

A batch is drawn as a handful of small choices (rows, lengths, side, what each row holds, one content seed), so that
drawing costs little beside the model and shrinking goes straight to fewer rows and shorter ones.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from hypothesis import strategies as st

from numerics_suite.core.records import Batch
from numerics_suite.inputs.labels import IGNORED
from numerics_suite.inputs.targets import is_row_of_numbers
from numerics_suite.inputs.vocabulary import InputSpace

CONTENTS = ("uniform", "repeated", "edges", "specials")
MASK_DTYPES = (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool, torch.float32, torch.bfloat16)


def row_ids(content: str, length: int, space: InputSpace, source: random.Random) -> list[int]:
    """Token ids of one row, none of them the pad id (unless it is all the vocabulary has).

    Args:
        content: one of :data:`CONTENTS`: any ids, one id repeated, first and last ids, special ids among others.
        length: number of tokens.
        space: the vocabulary.
        source: seeded generator.
    """

    def clean(token: int) -> int:
        return token if token != space.pad_id else (token + 1) % space.vocab_size

    def anything() -> int:
        return clean(source.randrange(space.vocab_size))

    if content == "repeated":
        return [anything()] * length
    if content == "edges":
        return [clean(source.choice((0, space.vocab_size - 1))) for _ in range(length)]
    if content == "specials":
        pool = [token for token in space.special_ids if token != space.pad_id] or [0]
        return [clean(source.choice(pool)) if source.random() < 0.25 else anything() for _ in range(length)]
    return [anything() for _ in range(length)]


def pad_rows(rows: list[list[int]], side: str, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of ids as `input_ids` and `attention_mask`, each `[batch, longest]` int64."""
    longest = max(len(row) for row in rows)
    ids, mask = [], []
    for row in rows:
        filler = longest - len(row)
        left = filler if side == "left" else 0
        ids.append([pad] * left + row + [pad] * (filler - left))
        mask.append([0] * left + [1] * len(row) + [0] * (filler - left))
    return torch.tensor(ids, dtype=torch.int64), torch.tensor(mask, dtype=torch.int64)


def draw_labels(ids: torch.Tensor, mask: torch.Tensor, space: InputSpace, source: random.Random) -> torch.Tensor:
    """Labels with some entries ignored and, after the shift, at least one that counts where a row has two tokens.

    Returns:
        int64 `[batch, sequence]` for language modelling and token classification, `[batch]` for sequence
        classification; float32 `[batch, labels]` for a regression of several numbers, and for several classes at once.
    """
    if space.task == "sequence-classification":
        # A regression learns ratings of 1 to 5, since a fresh head answers 0 and would have nothing to learn.
        choices = {"classes": range(space.num_labels), "numbers": range(1, 6), "many": range(2)}[space.targets]
        if is_row_of_numbers(space.targets, space.num_labels):
            rows = [[float(source.choice(choices)) for _ in range(space.num_labels)] for _ in range(ids.shape[0])]
            return torch.tensor(rows, dtype=torch.float32)
        return torch.tensor([source.choice(choices) for _ in range(ids.shape[0])], dtype=torch.int64)
    if space.task == "token-classification":
        labels = torch.tensor([[source.randrange(space.num_labels) for _ in row] for row in ids.tolist()])
    else:
        labels = ids.clone()
    labels[mask == 0] = IGNORED
    # The first real token after padding would be predicted from a row of padding, whose answer no definition fixes.
    if space.task == "causal-lm":
        labels[:, 1:][(mask[:, 1:] == 1) & (mask[:, :-1] == 0)] = IGNORED
    ignored = torch.tensor([[source.random() < 0.2 for _ in row] for row in ids.tolist()])
    # The last real token of the longest row always counts; with two tokens in it, one label survives the shift.
    longest = int(mask.sum(1).argmax())
    ignored[longest, int(mask[longest].nonzero()[-1])] = False
    labels[ignored] = IGNORED
    return labels


def build_batch(  # noqa: PLR0913 - each argument is one Hypothesis choice
    space: InputSpace, *, lengths: list[int], contents: list[str], side: str, content_seed: int, pad_inside: bool
) -> Batch:
    """The batch of these choices, as a pure function."""
    source = random.Random(content_seed)  # noqa: S311 - test data, not a secret
    rows = [row_ids(content, length, space, source) for content, length in zip(contents, lengths, strict=True)]
    inside = pad_inside and len(rows[0]) > 2
    if inside:
        rows[0][len(rows[0]) // 2] = space.pad_id
    ids, mask = pad_rows(rows, side, space.pad_id)
    tensors: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    tensors["labels"] = draw_labels(ids, mask, space, source)
    drawn = f"lengths={lengths} padding={side} contents={contents} seed={content_seed}"
    return Batch(tensors=tensors, drawn=drawn + (" pad id inside" if inside else ""), laws_apply=not inside)


@st.composite
def batches(draw: st.DrawFn, space: InputSpace, *, pad_inside: bool = False) -> Batch:
    """Batches of 1 to `max_rows` rows of 1 to `max_length` tokens, padded on a side that the family declares.

    Args:
        draw: Hypothesis's.
        space: what may be drawn.
        pad_inside: let some batches hold a pad id among the real tokens.
    """
    count = draw(st.integers(1, space.max_rows))
    lengths = draw(st.lists(st.integers(1, space.max_length), min_size=count, max_size=count))
    contents = draw(st.lists(st.sampled_from(CONTENTS), min_size=count, max_size=count))
    side = draw(st.sampled_from(space.sides))
    content_seed = draw(st.integers(0, 2**32 - 1))
    inside = draw(st.booleans()) if pad_inside else False
    return build_batch(
        space, lengths=lengths, contents=contents, side=side, content_seed=content_seed, pad_inside=inside
    )


def training_batch(space: InputSpace, *, rows: int, length: int, seed: int) -> Batch:
    """The fixed batch that a cell trains on: uniform ids, one full row, the others at least two tokens.

    Args:
        space: what may be drawn.
        rows: `--batch-size`.
        length: `--seq-len`.
        seed: `--seed`.
    """
    source = random.Random(f"training {seed}")  # noqa: S311 - test data, not a secret
    shortest = min(2, length)
    lengths = [length, *(source.randint(max(shortest, length // 2), length) for _ in range(rows - 1))]
    return build_batch(
        space,
        lengths=lengths,
        contents=["uniform"] * rows,
        side=space.sides[0],
        content_seed=source.randrange(2**32),
        pad_inside=False,
    )


LONG_ROW_BYTES = 2**30
"""Most bytes of the largest float64 tensors of a pass over one long row: one block's scores, and the output. A constant
and not the free memory, so that rows are equally long on every machine."""


def planned_batches(space: InputSpace, *, rows: int, length: int, seed: int) -> tuple[Batch, ...]:
    """Three batches of fixed shape: rows of one length, of several lengths, and these with a pad id inside.

    With four rows each batch has every kind of contents; the longest is never one token repeated, which would hide
    wrong positions. The first has no padding: the law of padding adds columns to it on every side. The second is padded
    on the left where the family allows it, which moves positions. No law applies to the third.

    Args:
        space: what may be drawn.
        rows: of each.
        length: of the longest row.
        seed: `--seed`.
    """
    shares = (1.0, 0.5, 0.75, 0.0)
    uneven = [max(1, round(length * shares[row % 4])) for row in range(rows)]
    return tuple(
        build_batch(
            space,
            lengths=lengths,
            contents=[CONTENTS[(row - turn) % len(CONTENTS)] for row in range(rows)],
            side="left" if "left" in space.sides else space.sides[0],
            content_seed=random.Random(f"planned {turn} {seed}").randrange(2**32),  # noqa: S311 - test data, not a secret
            pad_inside=turn == 2,
        )
        for turn, lengths in enumerate(([length] * rows, uneven, uneven))
    )


def long_row(space: InputSpace, longest: int, *, heads: int, seed: int) -> Batch | None:
    """One row as long as the config allows, and as fits into :data:`LONG_ROW_BYTES`; None where the planned rows are as long.

    Args:
        space: what may be drawn.
        longest: tokens that the config allows.
        heads: of attention, each of which holds the square of the length.
        seed: `--seed`.
    """
    words = space.vocab_size if space.task == "causal-lm" else space.num_labels
    length, most = space.max_length, LONG_ROW_BYTES // 8
    while length < longest and heads * (2 * length) ** 2 + words * 2 * length <= most:
        length *= 2
    length = min(length, longest)
    if length <= space.max_length:
        return None
    source = random.Random(f"long {seed}")  # noqa: S311 - test data, not a secret
    return build_batch(
        space,
        lengths=[length],
        contents=["uniform"],
        side=space.sides[0],
        content_seed=source.randrange(2**32),
        pad_inside=False,
    )
