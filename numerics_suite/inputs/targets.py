"""The targets of a sequence classifier: one class, numbers, or several classes at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Targets = Literal["classes", "numbers", "many"]
"""Kinds of a row's label: one class, a number for each output (a regression), or any of several classes at once."""


def targets_of(config: Mapping[str, Any], num_labels: int) -> Targets:
    """The kind of targets, from the config or else transformers' default.

    Args:
        config: `config.json`, or the values of a config.
        num_labels: outputs of the head.
    """
    told = config.get("problem_type")
    if told == "multi_label_classification":
        return "many"
    return "numbers" if told == "regression" or (told is None and num_labels == 1) else "classes"


def is_row_of_numbers(targets: Targets, num_labels: int) -> bool:
    """Whether a label is as many numbers as the head has outputs, and not one number or class.

    Args:
        targets: see :func:`targets_of`.
        num_labels: outputs of the head.
    """
    return targets == "many" or (targets == "numbers" and num_labels > 1)
