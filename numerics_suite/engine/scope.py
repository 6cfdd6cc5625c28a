"""What `--train-scope auto` trains: the most that fits in memory."""

from __future__ import annotations

from numerics_suite.core.records import Subject
from numerics_suite.devices.memory import free_bytes
from numerics_suite.devices.precisions import precision
from numerics_suite.subjects.memory import estimate_bytes

USABLE = 0.8
"""Share of the free memory that training may use; the rest is for workspaces and other programs."""


def choose_scope(subject: Subject, precision_name: str, device: str, *, rows: int, length: int) -> str:
    """`full` where training all parameters fits in 80 % of the free memory, else `last:1`, else `head`.

    Args:
        subject: resolved.
        precision_name: decides the bytes of a parameter.
        device: whose memory counts.
        rows: batch size.
        length: sequence length.
    """
    dtype = precision(precision_name).parameters
    full = estimate_bytes(subject, dtype, training=True, batch=rows, seq=length)
    held = estimate_bytes(subject, dtype, training=False, batch=rows, seq=length)
    if full is None or held is None:
        return "full"
    room = free_bytes(device) * USABLE
    # Training happens on a copy, so the model that the other checks use is in memory too.
    if held + full <= room:
        return "full"
    return "last:1" if 2 * held + (full - held) / 8 <= room else "head"
