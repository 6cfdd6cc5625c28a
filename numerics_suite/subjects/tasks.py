"""The task of a checkpoint, and whether it holds that task's head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from numerics_suite.core.errors import BadInputError
from numerics_suite.core.records import Task
from numerics_suite.subjects.families import Family
from numerics_suite.subjects.files import StoredTensor

_SUFFIXES: tuple[tuple[str, Task], ...] = (
    ("ForCausalLM", "causal-lm"),
    ("LMHeadModel", "causal-lm"),
    # ChatGLM's language model has such a name; a real encoder-decoder is recognised by its config.
    ("ForConditionalGeneration", "causal-lm"),
    ("ForSequenceClassification", "sequence-classification"),
    ("ForTokenClassification", "token-classification"),
)
TASKS: tuple[Task, ...] = ("causal-lm", "sequence-classification", "token-classification")
CLASSIFICATION = ("sequence-classification", "token-classification")
_BODY_PARTS = ("pooler", "pre_classifier")
"""Modules that some encoders build anew together with a classification head."""


HEADS = frozenset({"score", "classifier", "classifier_head", "lm_head", "qa_outputs"})
"""Names under which a new head is made for a task."""


def is_head(parameters: Iterable[str]) -> bool:
    """Whether all of these parameters belong to a head, by their names."""
    return all(HEADS & set(name.split(".")) for name in parameters)


def task_of_class(name: str) -> Task | None:
    """The task of a class by its name, None if the name does not say."""
    return next((task for suffix, task in _SUFFIXES if name.endswith(suffix)), None)


def choose_task(asked: str, config: Mapping[str, Any], *, where: str) -> Task:
    """The task to run: the requested one, or that of `architectures`.

    Args:
        asked: `auto` or a task.
        config: raw `config.json`.
        where: the file, for the message.

    Raises:
        BadInputError: `auto`, and no task follows from `architectures`.
    """
    if asked != "auto":
        return cast("Task", asked)
    names = architectures(config)
    found = [task for name in names if (task := task_of_class(name))]
    if found:
        return found[0]
    # GLM-4-9B's own config names its body, and so do checkpoints without a head.
    if not names or (names[0].endswith("Model") and not config.get("is_encoder_decoder")):
        return "causal-lm"
    message = f"{where}: architectures {list(names)} does not imply a task; pass --task, such as --task causal-lm"
    raise BadInputError(message)


def architectures(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names in the config's `architectures`."""
    names = config.get("architectures")
    return tuple(str(name) for name in names) if isinstance(names, (list, tuple)) else ()


def head_parts(family: Family, task: str) -> tuple[str, ...]:
    """Attribute names of the modules that belong to the task's head."""
    if task == "causal-lm":
        return family.lm_head_names
    return (*family.head_names, *_BODY_PARTS) if task in CLASSIFICATION else ()


def head_tensors(names: Iterable[str], family: Family, task: str) -> tuple[str, ...]:
    """Those of the tensor names that belong to the task's head."""
    parts = set(head_parts(family, task))
    return tuple(name for name in names if parts & set(name.split(".")))


def stored_labels(tensors: Mapping[str, StoredTensor], family: Family, task: str) -> int | None:
    """How many labels the stored head has, None where none is stored."""
    rows = [tensors[name].shape[0] for name in head_tensors(tensors, family, task) if len(tensors[name].shape) == 2]
    return rows[-1] if rows else None


def config_labels(config: Mapping[str, Any]) -> int:
    """Number of labels by `id2label` or `num_labels`, else 2 as everywhere in transformers."""
    labels, number = config.get("id2label"), config.get("num_labels")
    if isinstance(labels, Mapping) and labels:
        return len(labels)
    return number if isinstance(number, int) and number > 0 else 2


def needs_new_head(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], family: Family, task: str, asked_labels: int | None
) -> bool:
    """Whether fine-tuning for the task would make a new head.

    A head that `architectures` promises and the files lack is not new but missing, which `load.complete` reports.

    Args:
        tensors: what is stored.
        config: raw `config.json`.
        family: knows the head's names.
        task: what is run.
        asked_labels: `--num-labels`.
    """
    stored = stored_labels(tensors, family, task)
    if task in CLASSIFICATION and asked_labels is not None and stored not in (None, asked_labels):
        return True
    of_classes = {found for name in architectures(config) if (found := task_of_class(name))}
    if task in of_classes:
        # Without a stored head to compare, the config's number is what the file would hold.
        return task in CLASSIFICATION and stored is None and asked_labels not in (None, config_labels(config))
    if task == "causal-lm" and config.get("tie_word_embeddings"):
        return False
    if task in CLASSIFICATION and of_classes:
        return True  # what is stored, if anything, is another task's head under the same name
    return not head_tensors(tensors, family, task)
