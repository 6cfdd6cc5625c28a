"""`--effort` and the options that win over it."""

from __future__ import annotations

from typing import Any

from numerics_suite.inputs.effort import Effort, Shape
from numerics_suite.settings.table import BY_NAME
from numerics_suite.settings.tree import Settings


def effort_of(settings: Settings) -> Effort:
    """What the settings ask of every cell, whatever its model's size."""

    def asked(name: str) -> Any:
        """The value if it was set: by an option, or as a field that is not the default."""
        value = getattr(settings, name)
        return value if settings.explicit(name) or value != BY_NAME[name].default else None

    return Effort(
        name=settings.effort, examples=asked("max_examples"), rows=asked("batch_size"), length=asked("seq_len")
    )


def trained_shape(settings: Settings, parameters: int) -> Shape:
    """Rows, and tokens of the longest one, of the batch that a model with so many parameters is trained on."""
    return effort_of(settings).plan(parameters).training or (settings.batch_size, settings.seq_len)
