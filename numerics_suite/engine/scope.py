"""What `--train-scope auto` trains: the most that fits in memory."""

from __future__ import annotations

from typing import Final

from numerics_suite.core.records import Subject
from numerics_suite.devices.memory import free_bytes
from numerics_suite.devices.precisions import precision
from numerics_suite.subjects.memory import USABLE, held_bytes, training_bytes

SCOPES: Final = ("full", "last:1", "head")
"""The largest first."""


def choose_scope(subject: Subject, precision_name: str, device: str, *, rows: int, length: int) -> str:
    """`full` where training all parameters fits in 80 % of the free memory, else `last:1`, else `head`.

    Args:
        subject: resolved.
        precision_name: decides the bytes of a parameter.
        device: whose memory counts.
        rows: batch size.
        length: sequence length.
    """
    if subject.parameters is None:
        return "full"
    dtype = precision(precision_name).parameters
    room = free_bytes(device) * USABLE - held_bytes(subject, dtype, device)
    fitting = (s for s in SCOPES if training_bytes(subject, dtype, s, batch=rows, seq=length) <= room)
    return next(fitting, SCOPES[-1])
