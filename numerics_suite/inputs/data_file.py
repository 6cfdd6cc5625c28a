"""The user's own rows: `--data FILE.jsonl` with a text, a prompt and its completion, or a conversation on each line."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.inputs.targets import Targets, is_row_of_numbers

LONGEST_LINE = 1 << 24
"""Most bytes of a line: a row is held in memory as a whole, a file is not."""

FORMS = '{"text": "…", "label": 0}, {"prompt": "…", "completion": "…"} or {"messages": [{"role": "user", "content": "…"}, …]}'

PAIRS = (
    ("prompt", "completion"),
    *(
        (prompt, answer)
        for prompt in ("prompt", "instruction", "question")
        for answer in ("response", "answer", "output")
    ),
)
"""Keys of a prompt and of its completion: TRL's pair first, then those that other recipes use. An `instruction` may
have an `input`."""
COUNTED = 256
"""Most rows whose labels are counted: a tokenizer reads these in about a second."""
NAMES = {"text": "texts", "prompt": "prompts", "messages": "conversations"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One line of the file.

    Attributes:
        where: `--data FILE, line 3`.
        form: `text`, `prompt` or `messages`, by the key of the row.
        text: the text, or the prompt.
        completion: what follows the prompt.
        messages: `role` and `content` of each.
        label: of a text: a class, the number that a regression learns, or a list of numbers, one for each output; None without.
    """

    where: str
    form: str
    text: str = ""
    completion: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    label: float | tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Some rows of a file.

    Attributes:
        examples: those that a model gets, in the order of the file.
        counted: those and more, of which labels are counted.
        rows: how many the file has.
        seed: of the sample.
    """

    examples: tuple[Example, ...]
    counted: tuple[Example, ...]
    rows: int
    seed: int

    def __str__(self) -> str:
        """`8 of 24 prompts, drawn with seed 0`, or `6 texts` of all of them."""
        forms = {example.form for example in self.examples}
        name = NAMES[forms.pop()] if len(forms) == 1 else "rows"
        if len(self.examples) == self.rows:
            return f"{self.rows} {name if self.rows > 1 else name.removesuffix('s')}"
        return f"{len(self.examples)} of {self.rows} {name}, drawn with seed {self.seed}"


def read_sample(path: Path, *, size: int, seed: int, check: Callable[[Example], None] | None = None) -> Sample:
    """A seeded sample of the rows of a JSONL file, empty lines left out; memory is bounded by the sample, not by the file.

    Args:
        path: of the file, UTF-8 with or without a byte-order mark. Only a line feed ends a line: a string may hold U+2028.
        size: most rows that a model gets; of :data:`COUNTED` at least the labels are counted.
        seed: same seed, same rows. Every row is as likely as any other (algorithm R, Vitter 1985).
        check: called on every row of the file, sampled or not.

    Raises:
        BadInputError: the file cannot be read, holds nothing, or a line of it (named by number) is malformed.
    """
    source, rows, wide = random.Random(f"data {seed}"), 0, max(size, COUNTED)  # noqa: S311 - a sample, not a secret
    held: list[tuple[int, Example]] = []
    for example in _examples(path):
        if check is not None:
            check(example)
        place = rows if rows < wide else source.randrange(rows + 1)
        if place < len(held):
            held[place] = (rows, example)
        elif place < wide:
            held.append((rows, example))
        rows += 1
    if not rows:
        message = f"--data {path}: holds no example; write one JSON object per line, such as {FORMS}"
        raise BadInputError(message)
    held.sort(key=lambda pair: pair[0])
    counted = tuple(example for _, example in held)
    given = sorted(source.sample(range(len(held)), min(size, len(held))))
    return Sample(examples=tuple(counted[place] for place in given), counted=counted, rows=rows, seed=seed)


def check_label(example: Example, task: str, num_labels: int, targets: Targets) -> None:
    """Refuse a row that a classifier cannot take.

    Args:
        example: one row.
        task: a sequence classifier needs a label on every line.
        num_labels: outputs of its head.
        targets: a regression takes any number, and several classes at once take 0 or 1 for each.

    Raises:
        BadInputError: naming the line, the label and `--num-labels`.
    """
    label, sequence = example.label, task == "sequence-classification"
    if label is None:
        if not sequence:
            return
        message = f"{example.where}: sequence classification needs a 'label' on every line"
        raise BadInputError(message)
    if sequence and is_row_of_numbers(targets, num_labels):
        _check_row(example, num_labels, targets)
        return
    if isinstance(label, tuple):
        message = f"{example.where}: 'label' is a list of {len(label)} numbers, but this model learns one number for each text"
        raise BadInputError(message)
    if sequence and targets == "numbers":
        return
    if label < 0 or not isinstance(label, int):
        message = f"{example.where}: label {label} is not a class; classes are whole numbers from 0"
        raise BadInputError(message)
    if label >= num_labels:
        message = f"{example.where}: label {label} needs --num-labels {label + 1} or more, not {num_labels}"
        raise BadInputError(message)


def _check_row(example: Example, num_labels: int, targets: Targets) -> None:
    label = example.label
    kind = "0 or 1 for each class" if targets == "many" else "a number for each output"
    if not isinstance(label, tuple) or len(label) != num_labels:
        given = f"a list of {len(label)}" if isinstance(label, tuple) else str(label)
        message = f"{example.where}: 'label' must be a list of {num_labels}, {kind} (problem_type in config.json), not {given}"
        raise BadInputError(message)
    # Between 0 and 1 it is the share of raters who saw that class.
    if targets == "many" and not all(0 <= number <= 1 for number in label):
        message = f"{example.where}: 'label' must hold {kind}, not {list(label)}"
        raise BadInputError(message)


def _examples(path: Path) -> Iterator[Example]:
    if path.exists() and not path.is_file():
        message = f"--data {path}: is not a regular file, and it is read more than once; write the rows to a file"
        raise BadInputError(message)
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                where = f"--data {path}, line {number}"
                if len(line) > LONGEST_LINE:
                    message = f"{where}: is longer than {LONGEST_LINE >> 20} MiB; split or shorten it"
                    raise BadInputError(message)
                if line.strip():
                    yield _example(line, where)
    except OSError as error:
        message = f"--data {path}: {error.strerror}"
        raise BadInputError(message) from None


def _example(line: bytes, where: str) -> Example:
    record = _record(line, where)
    if not isinstance(record, dict):
        message = f"{where}: needs an object with 'text', 'prompt' or 'messages', such as {FORMS}"
        raise BadInputError(message)
    if "messages" in record:
        return Example(where=where, form="messages", messages=_messages(record["messages"], where))
    pair = next((pair for pair in PAIRS if pair[0] in record and pair[1] in record), PAIRS[0])
    if "completion" in record or ("text" not in record and pair[0] in record):
        return _prompt_and_answer(record, pair, where)
    if "text" not in record:
        message = f"{where}: needs 'text', 'prompt' with 'completion', or 'messages', such as {FORMS}"
        raise BadInputError(message)
    text = _filled(_string(record, "text", where), "text", where)
    return Example(where=where, form="text", text=text, label=_label(record, where))


def _prompt_and_answer(record: Mapping[str, Any], pair: tuple[str, str], where: str) -> Example:
    """The two texts, separated by a space unless one of them has white space there; TRL's pair is joined unchanged."""
    prompt, answer = (_string(record, key, where) for key in pair)
    if record.get("input") and pair[0] == "instruction":
        prompt = f"{prompt}\n{_string(record, 'input', where)}"
    answer = _filled(answer, pair[1], where)
    if pair != PAIRS[0] and prompt and not prompt[-1].isspace() and not answer[0].isspace():
        answer = f" {answer}"
    return Example(where=where, form="prompt", text=prompt, completion=answer)


def _record(line: bytes, where: str) -> Any:
    try:
        # A byte-order mark before the first line, or before any where files were put together.
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except json.JSONDecodeError as error:
        reason = f"not JSON ({error.msg} at column {error.colno})"
    except ValueError as error:  # a whole number of thousands of digits
        reason = f"not JSON that can be read ({error})"
    except RecursionError:
        reason = "not JSON that can be read (nested too deeply)"
    message = f"{where}: {reason}"
    raise BadInputError(message)


def _string(record: Mapping[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        message = f"{where}: needs a string '{key}', such as {FORMS}"
        raise BadInputError(message)
    return _text(value, f"'{key}'", where)


def _text(value: str, key: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        message = f"{where}: {key} holds half of a surrogate pair, which is not valid text"
        raise BadInputError(message) from None
    return value


def _filled(value: str, key: str, where: str) -> str:
    if not value.strip():
        message = f"{where}: '{key}' is empty"
        raise BadInputError(message)
    return value


def _label(record: Mapping[str, Any], where: str) -> float | tuple[float, ...] | None:
    label = record.get("label")
    if label is None or _is_number(label):
        return label
    if isinstance(label, list) and label and all(map(_is_number, label)):
        return tuple(label)
    message = f"{where}: 'label' must be a number or a list of numbers, not {label!r}"
    raise BadInputError(message)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _messages(messages: object, where: str) -> tuple[Mapping[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        message = f"{where}: 'messages' must be a list of at least one message"
        raise BadInputError(message)
    told = []
    for index, each in enumerate(messages):
        if not isinstance(each, dict) or not all(isinstance(each.get(key), str) for key in ("role", "content")):
            message = f"{where}: messages[{index}] needs 'role' and 'content', both strings"
            raise BadInputError(message)
        told.append({key: _text(each[key], f"messages[{index}].{key}", where) for key in ("role", "content")})
    return tuple(told)
