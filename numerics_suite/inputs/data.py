"""The user's own small batch: `--data FILE.jsonl` with one `{"text": …, "label": …}` a line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One line of the file: a text, and its label where it has one."""

    text: str
    label: int | None


def _example(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        message = f"{where}: not JSON ({error.msg} at column {error.colno})"
        raise BadInputError(message) from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        message = f'{where}: needs an object with a string \'text\', such as {{"text": "…", "label": 0}}'
        raise BadInputError(message)
    label = record.get("label")
    if label is not None and (not isinstance(label, int) or isinstance(label, bool) or label < 0):
        message = f"{where}: 'label' must be a whole number from 0, not {label!r}"
        raise BadInputError(message)
    if not record["text"].strip():
        message = f"{where}: 'text' is empty"
        raise BadInputError(message)
    return Example(text=record["text"], label=label)


def read_examples(path: Path) -> tuple[Example, ...]:
    """The examples of a JSONL file, empty lines left out.

    Raises:
        BadInputError: the file cannot be read, holds nothing, or a line of it (named by number) is malformed.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        message = f"--data {path}: {reason}"
        raise BadInputError(message) from None
    examples = tuple(
        _example(line, f"--data {path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()
    )
    if not examples:
        message = f"--data {path}: holds no example"
        raise BadInputError(message)
    return examples


def check_labels(examples: tuple[Example, ...], path: Path, num_labels: int) -> None:
    """Refuse labels that the head has no class for.

    Raises:
        BadInputError: naming the first line and `--num-labels`.
    """
    for example in examples:
        if example.label is None:
            message = f"--data {path}: sequence classification needs a 'label' on every line"
            raise BadInputError(message)
        if example.label >= num_labels:
            message = (
                f"--data {path}: label {example.label} needs --num-labels {example.label + 1} or more, not {num_labels}"
            )
            raise BadInputError(message)


def data_batch(  # noqa: PLR0913
    examples: tuple[Example, ...], tokenizer: Any, *, task: str, side: str, max_length: int, pad_id: int
) -> Batch:
    """The user's texts as one batch, tokenised and padded as a training script would.

    Args:
        examples: the lines of the file.
        tokenizer: the subject's.
        task: decides the labels.
        side: padding side.
        max_length: texts are cut to it.
        pad_id: the id that padding writes.

    Returns:
        `input_ids`, `attention_mask` `[batch, sequence]` and labels, all int64.
    """
    import torch

    from numerics_suite.inputs.strategies import IGNORED, pad_rows

    rows = [list(tokenizer(example.text)["input_ids"])[:max_length] for example in examples]
    ids, mask = pad_rows(rows, side, pad_id)
    if task == "sequence-classification":
        labels = torch.tensor([example.label for example in examples], dtype=torch.int64)
    else:
        labels = ids.masked_fill(mask == 0, IGNORED)
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return Batch(tensors=tensors, drawn=f"--data, {len(rows)} texts")
