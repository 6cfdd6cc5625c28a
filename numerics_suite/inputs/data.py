"""The user's own small batch: `--data FILE.jsonl` with one `{"text": …, "label": …}` a line."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import Batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One line of the file: a text, and its label where it has one: a class, or the number that a regression learns."""

    text: str
    label: float | None


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
    if label is not None and (
        not isinstance(label, int | float) or isinstance(label, bool) or not math.isfinite(label)
    ):
        message = f"{where}: 'label' must be a number, not {label!r}"
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


def check_labels(examples: tuple[Example, ...], path: Path, task: str, num_labels: int) -> None:
    """Refuse labels that the head has no class for.

    Args:
        examples: the lines of the file.
        path: of the file, for the message.
        task: a sequence classifier needs a label on every line.
        num_labels: 1 means regression, which takes any number.

    Raises:
        BadInputError: naming the label and `--num-labels`.
    """
    regression = task == "sequence-classification" and num_labels == 1
    for example in examples:
        if example.label is None:
            if task != "sequence-classification":
                continue
            message = f"--data {path}: sequence classification needs a 'label' on every line"
            raise BadInputError(message)
        if regression:
            continue
        if example.label < 0 or not isinstance(example.label, int):
            message = f"--data {path}: label {example.label} is no class; classes are whole numbers from 0"
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
        `input_ids`, `attention_mask` `[batch, sequence]` and labels, all int64; a regression's labels float32. A token
        classifier has the text's label at each of its tokens, and none at all where a text has none.
    """
    import torch

    from numerics_suite.inputs.labels import IGNORED
    from numerics_suite.inputs.strategies import pad_rows
    from numerics_suite.subjects.tokenizers import tokenizer_failures

    with tokenizer_failures("reading the texts of --data"):
        rows = [list(tokenizer(example.text)["input_ids"])[:max_length] for example in examples]
    ids, mask = pad_rows(rows, side, pad_id)
    tensors = {"input_ids": ids, "attention_mask": mask}
    given = [example.label for example in examples if example.label is not None]
    if task == "causal-lm":
        tensors["labels"] = ids.masked_fill(mask == 0, IGNORED)
    elif len(given) == len(examples):
        whole = all(isinstance(label, int) for label in given)
        labels = torch.tensor(given, dtype=torch.int64 if whole else torch.float32)
        by_token = task == "token-classification"
        tensors["labels"] = labels[:, None].expand_as(ids).masked_fill(mask == 0, IGNORED) if by_token else labels
    return Batch(tensors=tensors, drawn=f"--data, {len(rows)} texts")
