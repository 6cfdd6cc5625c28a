"""What tools/on_accelerator.py has measured, as a file, as a page and as a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from accelerator_parts import PARTS, Part, Value

from numerics_suite.core.atomic import write_atomic
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.numbers import jsonable, revived
from numerics_suite.reports.results import dump

MARKS = ("<!-- figures: begin -->", "<!-- figures: end -->")
NOT_RUN = "not run yet"
SCHEMA_VERSION = 1


def read_parts(path: Path) -> dict[str, Part]:
    """The parts that a file holds, by name.

    Raises:
        BadInputError: it cannot be read, or is no file of this script.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not valid JSON"
        message = f"{path}: {why}"
        raise BadInputError(message) from None
    names = {field.name for field in fields(Part)}
    parts = content.get("parts") if isinstance(content, dict) else None
    if not isinstance(parts, dict) or content.get("schema_version") != SCHEMA_VERSION:
        message = f"{path}: not a file of tools/on_accelerator.py; name another one"
        raise BadInputError(message)
    for name, part in parts.items():
        if name not in PARTS or not isinstance(part, dict) or set(part) != names:
            message = f"{path}: part '{name}' is not of this release; delete the file and measure again"
            raise BadInputError(message)
    return {name: _part(part) for name, part in parts.items()}


def _part(content: Mapping[str, Any]) -> Part:
    rows = tuple(tuple(revived(value) for value in row) for row in content["rows"])
    return Part(**{**content, "columns": tuple(content["columns"]), "rows": rows})


def write_parts(path: Path, parts: Mapping[str, Part]) -> None:
    """Write the parts, in the order in which they run."""
    content = {
        "schema_version": SCHEMA_VERSION,
        "parts": {name: asdict(parts[name]) for name in PARTS if name in parts},
    }
    write_atomic(path, dump(jsonable(content)), "--json")


def read_page(path: Path) -> str:
    """The text of the page.

    Raises:
        BadInputError: it cannot be read, or has no place for the figures.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        message = f"--write {path}: {error.strerror}"
        raise BadInputError(message) from None
    if [text.count(mark) for mark in MARKS] != [1, 1] or text.index(MARKS[0]) > text.index(MARKS[1]):
        message = f"--write {path}: the figures go between {MARKS[0]} and {MARKS[1]}, each once; add the two lines"
        raise BadInputError(message)
    return text


def write_page(path: Path, parts: Mapping[str, Part]) -> None:
    """Put the figures between the marks of the page; the rest of it is written by hand."""
    text = read_page(path)
    before, after = text.partition(MARKS[0])[0], text.partition(MARKS[1])[2]
    write_atomic(path, f"{before}{MARKS[0]}\n{figures(parts)}\n{MARKS[1]}{after}", "--write")


def figures(parts: Mapping[str, Part]) -> str:
    """A summary, and a section for each part with its figures.

    Only a GPU's figures in whole size are shown: those of the CPU, of a stand-in or of `--small` show that the script
    runs, and say nothing about a GPU.

    Args:
        parts: by name.
    """
    shown = {name: parts[name] for name in PARTS if name in parts and parts[name].published}
    summary = [(name, description.aim, *_told(shown.get(name))) for name, description in PARTS.items()]
    lines = [*table(("part", "aim", "result", "seconds"), summary)]
    for name, part in shown.items():
        lines += ["", f"### {name}", "", f"{_escaped(part.device)}; {part.versions}. {_sentence(part.reason)}".rstrip()]
        lines += ["", *table(part.columns, part.rows)] if part.rows else []
    return "\n".join(lines)


def _told(part: Part | None) -> tuple[Value, Value]:
    return (NOT_RUN, None) if part is None else (part.verdict, part.seconds)


def _sentence(text: str) -> str:
    return _escaped(f"{text[:1].upper()}{text[1:]}.") if text else ""


def table(columns: Sequence[str], rows: Sequence[tuple[Value, ...]]) -> list[str]:
    """The lines of a table in Markdown."""
    return [
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
        *(f"| {' | '.join(_escaped(shown(value)) for value in row)} |" for row in rows),
    ]


def shown(value: Value) -> str:
    """A value for a reader: three digits of a number, a dash for none."""
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _escaped(text: str) -> str:
    """Without what ends a cell or begins a tag."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def terminal_table(parts: Mapping[str, Part]) -> str:
    """One line for each part: verdict, seconds, reason."""
    return "\n".join(
        f"{name:8}  {part.verdict:14}  {part.seconds:6.1f} s  {part.reason}" for name, part in parts.items()
    )
