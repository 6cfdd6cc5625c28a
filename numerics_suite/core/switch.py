"""Whether what other packages add takes part: a switch of the process, by itself so that `--help` loads nothing more."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SWITCH, OFF = "NUMERICS_SUITE_EXTENSIONS", "off"
"""The variable that turns extensions off, in this process and in those that it starts; `--no-extensions` sets it."""


def switched_on() -> bool:
    """Whether extensions are looked for at all."""
    return os.environ.get(SWITCH, "").lower() != OFF


def switch_off() -> None:
    """From now on there are none, in this process and in those that it starts; :func:`switch_kept` bounds that."""
    os.environ[SWITCH] = OFF


@contextlib.contextmanager
def switch_kept() -> Iterator[None]:
    """Whatever a command or a test run does to the switch is undone when it ends."""
    before = os.environ.get(SWITCH)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(SWITCH, None)
        else:
            os.environ[SWITCH] = before
