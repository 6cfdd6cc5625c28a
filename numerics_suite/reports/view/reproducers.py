"""The text of a finding's reproducer, where it can be read and is one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numerics_suite.reports.view.places import CheckCell
    from numerics_suite.reports.view.problems import Problem

LARGEST = 32_768
"""Bytes of one script; those that the tool writes have fewer than 80 lines."""

MARK = "Found by numerics-suite"
"""What every reproducer says of itself. A results file of somebody else can name any path, so a file without it is not shown."""


@dataclass(slots=True, kw_only=True)
class Scripts:
    """How much of reproducers a page may hold.

    Attributes:
        left: bytes that may still be spent.
    """

    left: int = 600_000
    read: dict[Path, str] = field(default_factory=dict)


def script_text(problem: Problem, scripts: Scripts) -> tuple[str, str]:
    """The path of the first reproducer of a problem, and its text; both empty without one, the text where it cannot be read.

    Args:
        problem: equal findings.
        scripts: how much may still be shown; lessened by what is.
    """
    named = ""
    for place in problem.places:
        finding = place.result.finding
        if finding is None or not finding.reproducer:
            continue
        named = named or finding.reproducer
        text = next((text for path in _candidates(finding.reproducer, place) if (text := _read(path, scripts))), "")
        if text:
            return finding.reproducer, text
    return named, ""


def _candidates(named: str, place: CheckCell) -> Iterator[Path]:
    """As it was written, from where the command ran; or beside the results file and in the folders above it."""
    path = Path(named)
    yield path
    written = place.source.run.path if place.source.run is not None else None
    if written is not None and not path.is_absolute():
        yield from (folder / path for folder in list(written.resolve().parents)[:5])


def _read(path: Path, scripts: Scripts) -> str:
    if path in scripts.read:
        return scripts.read[path]
    text = ""
    try:
        if path.suffix == ".py" and path.is_file() and path.stat().st_size <= min(LARGEST, scripts.left):
            text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        text = ""
    text = text if MARK in text else ""
    scripts.read[path] = text
    scripts.left -= len(text.encode())
    return text
