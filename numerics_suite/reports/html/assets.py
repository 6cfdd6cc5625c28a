"""The page's own style and programs, and the vendored libraries: read from package data, inlined, and named by digest."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path
from typing import Final

STATIC: Final = Path(__file__).resolve().parent / "static"
VENDORED: Final = ("vendor/d3.min.js", "vendor/plot.umd.min.js")
OWN: Final = ("theme.js", "copy.js", "filter.js", "grid.js", "map.js", "plots.js", "main.js")
"""One program in several files: they share one scope, and the last one starts it."""


@cache
def style() -> str:
    """The style sheet."""
    return (STATIC / "report.css").read_text(encoding="utf-8")


@cache
def early() -> str:
    """The program that runs before anything is painted."""
    return (STATIC / "early.js").read_text(encoding="utf-8")


@cache
def scripts(*, plots: bool) -> tuple[str, ...]:
    """The programs at the end of the page, in the order in which they run.

    Args:
        plots: something is drawn, so that the libraries are needed.
    """
    vendored = [(STATIC / name).read_text(encoding="utf-8") for name in VENDORED] if plots else []
    own = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in OWN)
    return (*vendored, f'(() => {{\n"use strict";\n{own}\n}})();\n')


def policy(texts: tuple[str, ...]) -> str:
    """The content security policy that lets these scripts run and no other, and nothing be fetched.

    Args:
        texts: of the script elements, to the letter.
    """
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
