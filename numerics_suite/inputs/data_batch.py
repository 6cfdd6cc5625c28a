"""The user's own rows as a batch: tokenised, cut and labelled as a fine-tuning script does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import Batch
from numerics_suite.inputs.data_file import Example, Sample

ASSISTANT = "assistant"
"""The role whose messages are trained on."""


def data_batch(  # noqa: PLR0913 - each is a fact of the cell
    sample: Sample, tokenizer: Any, *, task: str, side: str, rows: int, max_length: int, pad_id: int
) -> Batch:
    """The rows as one batch.

    Args:
        sample: of the file.
        tokenizer: the subject's.
        task: decides the labels.
        side: padding side.
        rows: most rows.
        max_length: rows are cut to it, at their end.
        pad_id: the id that padding writes.

    Returns:
        `input_ids`, `attention_mask` `[batch, sequence]` and labels, all int64; a regression's labels float32. A
        language model learns every token of a text, the completion of a prompt, the assistant's messages of a
        conversation. A token classifier gets the text's label at each token, and no label if the text has none.

    Raises:
        BadInputError: the chat template refuses a conversation, or there is none.
        TokenizerRaisesError: the tokenizer raises.
    """
    import torch

    from numerics_suite.inputs.labels import IGNORED
    from numerics_suite.inputs.strategies import pad_rows
    from numerics_suite.subjects.tokenizers import tokenizer_failures

    examples = sample.examples[:rows]
    with tokenizer_failures("reading the rows of --data"):
        encoded = [encode(example, tokenizer) for example in examples]
        counted = [encode(example, tokenizer) for example in sample.counted] if task == "causal-lm" else []
    ids, mask = pad_rows([row[:max_length] for row, _ in encoded], side, pad_id)
    tensors = {"input_ids": ids, "attention_mask": mask}
    given = [example.label for example in examples if example.label is not None]
    if task == "causal-lm":
        learns, _ = pad_rows([list(map(int, learnt))[:max_length] for _, learnt in encoded], side, 0)
        tensors["labels"] = ids.masked_fill(learns == 0, IGNORED)
    elif len(given) == len(examples):
        whole = all(isinstance(label, int) for label in given)
        labels = torch.tensor(given, dtype=torch.int64 if whole else torch.float32)
        by_token = task == "token-classification"
        tensors["labels"] = labels[:, None].expand_as(ids).masked_fill(mask == 0, IGNORED) if by_token else labels
    told = sample if len(examples) == len(sample.examples) else f"{len(examples)} of {sample.rows} rows"
    # The first token of a row is predicted from nothing.
    counts = tuple(sum(learnt[1:max_length]) for _, learnt in counted)
    return Batch(tensors=tensors, drawn=f"--data, {told}", label_counts=counts, rows_in_file=sample.rows)


def encode(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The ids of a row, and which of them are trained on.

    The prompt ends where its own ids stop agreeing with those of the whole: the first token of a completion
    may merge with the prompt's last.

    Args:
        example: one row.
        tokenizer: the subject's.

    Raises:
        BadInputError: see :func:`data_batch`.
    """
    if example.form == "messages":
        return _conversation(example, tokenizer)
    if example.form == "text":
        ids = list(tokenizer(example.text)["input_ids"])
        return ids, [True] * len(ids)
    ids = list(tokenizer(example.text + example.completion)["input_ids"])
    start = _agreeing(list(tokenizer(example.text)["input_ids"]), ids)
    end = tokenizer.eos_token_id
    ids += [end] if isinstance(end, int) and ids[-1:] != [end] else []
    return ids, [place >= start for place in range(len(ids))]


def _conversation(example: Example, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The templated messages; the assistant's are trained on, without their headings."""
    messages = [dict(message) for message in example.messages]

    def rendered(count: int, *, heading: bool = False) -> list[int]:
        return _templated(example, tokenizer, messages[:count], heading=heading)

    ids = rendered(len(messages))
    learnt = [False] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            start = _agreeing(rendered(index, heading=True), ids) if index else 0
            end = _agreeing(rendered(index + 1), ids)
            learnt[start:end] = [True] * max(end - start, 0)
    return ids, learnt


def _templated(example: Example, tokenizer: Any, messages: list[dict[str, str]], *, heading: bool) -> list[int]:
    apply: Callable[..., Any] | None = getattr(tokenizer, "apply_chat_template", None)
    if apply is None or getattr(tokenizer, "chat_template", None) is None:
        message = f"{example.where}: 'messages' needs a chat template, which the tokenizer lacks; use 'text' or 'prompt' with 'completion'"
        raise BadInputError(message)
    try:
        # Releases differ in whether they give a list or a dict of lists unless told.
        return list(apply(messages, tokenize=True, add_generation_prompt=heading, return_dict=False))
    except Exception as error:  # noqa: BLE001 - a template raises what it likes; whatever it is, the row is named
        told = " ".join(str(error).split())
        message = f"{example.where}: the chat template refuses 'messages': {told or type(error).__name__}"
        raise BadInputError(message) from None


def _agreeing(some: list[int], whole: list[int]) -> int:
    """Length of the common prefix."""
    return next(
        (n for n, (one, other) in enumerate(zip(some, whole, strict=False)) if one != other), min(len(some), len(whole))
    )
