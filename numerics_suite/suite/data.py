"""`--data` of a run: its rows are checked before anything runs, and a sample of them is what cells are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numerics_suite.core.errors import BadInputError, NotApplicableError
from numerics_suite.core.records import Batch, Subject
from numerics_suite.inputs.data_batch import data_batch
from numerics_suite.inputs.data_file import Example, Sample, check_label, read_sample
from numerics_suite.inputs.labels import counted_labels
from numerics_suite.inputs.targets import targets_of
from numerics_suite.inputs.vocabulary import InputSpace, most_rows, pad_id
from numerics_suite.settings.tree import Settings
from numerics_suite.subjects.families import family_of
from numerics_suite.subjects.tasks import CLASSIFICATION
from numerics_suite.subjects.tokenizers import TokenizerRaisesError, load_tokenizer, tokenizer_folder


def sample_of(settings: Settings, subjects: Mapping[str, Subject] | None = None) -> Sample:
    """The rows that cells are given.

    Args:
        settings: with `--data`.
        subjects: classifiers among them must be able to take every row of the file; None where that is known.

    Raises:
        BadInputError: the file, or a line of it, cannot be used.
    """
    assert settings.data is not None
    classifiers = [subject for subject in (subjects or {}).values() if subject.task in CLASSIFICATION]

    def check(example: Example) -> None:
        for subject in classifiers:
            check_label(example, subject.task, subject.num_labels, targets_of(subject.config, subject.num_labels))

    size = most_rows(settings.batch_size)
    return read_sample(settings.data, size=size, seed=settings.seed, check=check if classifiers else None)


def batch_of(sample: Sample, subject: Subject, space: InputSpace, tokenizer: Any) -> Batch:
    """The sample as a batch for a cell; see :func:`data_batch` for the errors."""
    return data_batch(
        sample,
        tokenizer,
        task=subject.task,
        side=family_of(subject.config).padding_sides[0],
        rows=space.max_rows,
        max_length=space.max_length,
        pad_id=space.pad_id,
    )


def checked_data(settings: Settings, subjects: Mapping[str, Subject]) -> str:
    """Read `--data` once before anything runs, so that a malformed line is an error of the command line.

    Returns:
        What is taken of it, and for each subject how many labels count; empty without `--data`.

    Raises:
        BadInputError: naming the line; or a subject has no tokenizer to read it with.
    """
    if settings.data is None:
        return ""
    sample = sample_of(settings, subjects)
    told = []
    for subject in subjects.values():
        if subject.path is None:
            continue
        if tokenizer_folder(subject) is None:
            message = f"--data {settings.data}: {subject.source} has no tokenizer to read its texts with"
            raise BadInputError(message)
        try:
            counted = _counted(settings, sample, subject)
        except (TokenizerRaisesError, NotApplicableError):
            continue  # inputs.pipeline says why
        told.append(f"{subject.id}: {counted}" if len(subjects) > 1 else counted)
    return "; ".join([str(sample), *told])


def _counted(settings: Settings, sample: Sample, subject: Subject) -> str:
    """`12 of 96 tokens are labels that count`, as a cell cuts the rows."""
    pad = pad_id(subject.config)
    space = InputSpace(
        vocab_size=pad + 1,
        pad_id=pad,
        max_rows=most_rows(settings.batch_size),
        max_length=settings.seq_len,
    )
    batch = batch_of(sample, subject, space, load_tokenizer(subject))
    labels = batch.tensors.get("labels")
    if labels is None:
        return "no labels"
    number = int(counted_labels(labels, shifted=subject.task == "causal-lm").sum())
    count = f"{number} {'label counts' if number == 1 else 'labels count'}"
    if subject.task == "sequence-classification":
        return count
    empty = sum(not labelled for labelled in batch.label_counts)
    left = f"; of {len(batch.label_counts)} rows {empty} have none" if empty else ""
    tokens = int(batch.tensors["attention_mask"].sum())
    return f"of their {tokens} tokens {count}{left}, cut to {settings.seq_len} tokens (--seq-len)"
