"""JSON that somebody else wrote, within limits: nothing in it can exhaust memory or the stack of the one who reads it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

LARGEST = 64 * 2**20
"""Bytes. Python's objects take some twenty times the bytes of JSON such as `[[],[],…]`."""

DEEPEST = 100
"""Lists and objects inside each other; ours have fewer than ten, a config has fewer than twenty."""

MOST = 4_000_000
"""Values in one document."""


def read_bytes(path: Path, largest: int = LARGEST) -> bytes:
    """A file that is not too large to be what it should be.

    Raises:
        ValueError: it is larger.
        OSError: it cannot be read.
    """
    with open(path, "rb", opener=_at_once) as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        message = f"larger than {largest:,} bytes"
        raise ValueError(message)
    return content


def _at_once(path: str, flags: int) -> int:
    """Open without waiting: a named pipe without a writer reads as empty, as one whose writer has ended."""
    if not Path(path).is_fifo():
        return os.open(path, flags)
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    return descriptor


def parse_json(text: bytes | str) -> Any:
    """The values of a JSON document.

    Raises:
        ValueError: it is not JSON, or has more or deeper values than any document of ours.
    """
    try:
        content = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except RecursionError:
        message = f"more than {DEEPEST} lists and objects inside each other"
        raise ValueError(message) from None
    _refuse_unreasonable(content)
    return content


def read_json_text(path: Path, largest: int = LARGEST) -> Any:
    """Both at once, as :func:`read_bytes` and :func:`parse_json`."""
    return parse_json(read_bytes(path, largest))


def _refuse_unreasonable(content: Any) -> None:
    level, depth, count = [content], 0, 0
    while level:
        depth, count = depth + 1, count + len(level)
        if depth > DEEPEST or count > MOST:
            what = f"{DEEPEST} lists and objects inside each other" if depth > DEEPEST else f"{MOST:,} values"
            message = f"more than {what}"
            raise ValueError(message)
        level = [
            inner
            for value in level
            if isinstance(value, (list, dict))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
