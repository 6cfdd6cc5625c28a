"""The ids a model accepts and the shape of the batches drawn from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from numerics_suite.inputs.targets import Targets

Side = Literal["left", "right"]


LEAST_ROWS = 8
"""Fewest rows of drawn batches, and of the sample of a user's file, unless `--batch-size` is 1."""


def most_rows(rows: int) -> int:
    """The most rows of a batch.

    Args:
        rows: `--batch-size`.
    """
    return 1 if rows == 1 else max(LEAST_ROWS, rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSpace:
    """What batches may be drawn for a subject.

    Attributes:
        vocab_size: rows of the input embedding; ids are 0 to vocab_size - 1.
        pad_id: the id that padding writes.
        special_ids: ids with a meaning (BOS, EOS, …), mixed into some rows.
        sides: the padding sides that the family declares.
        task: decides the labels.
        num_labels: classes of a classification head.
        targets: what a sequence classifier's label is.
        max_rows: most rows of a batch.
        max_length: most tokens of a row.
        pools_by_pad: the classifier finds the last token by pad id, so a pad id among real tokens moves it.
    """

    vocab_size: int
    pad_id: int
    special_ids: tuple[int, ...] = ()
    sides: tuple[Side, ...] = ("left", "right")
    task: str = "causal-lm"
    num_labels: int = 2
    targets: Targets = "classes"
    max_rows: int = 8
    max_length: int = 64
    pools_by_pad: bool = False


def special_ids(config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The ids that the config gives a meaning, inside the vocabulary, sorted.

    Args:
        config: raw `config.json`.
        vocab_size: rows of the embedding.
    """
    found: set[int] = set()
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        value = config.get(key)
        values = value if isinstance(value, list) else [value]
        found.update(item for item in values if isinstance(item, int))
    return tuple(sorted(item for item in found if 0 <= item < vocab_size))


def pad_id(config: Mapping[str, Any]) -> int:
    """The id that padding writes: `pad_token_id`, else the first EOS id, else 0."""
    value = config.get("pad_token_id")
    if isinstance(value, int):
        return value
    eos = config.get("eos_token_id")
    first = eos[0] if isinstance(eos, list) and eos else eos
    return first if isinstance(first, int) else 0
