"""`[tool.numerics-suite]` as text: only what the user chose, under the keys that pyproject.toml takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from numerics_suite.core.errors import BadInputError
from numerics_suite.settings.sources import has_table
from numerics_suite.settings.table import OPTIONS
from numerics_suite.settings.tree import Settings

HEAD = """\
# Read by `numerics-suite check`; every option of that command has a key here.
[tool.numerics-suite]
"""


def text_in(file: Path) -> str | None:
    """The text of a pyproject.toml, None where there is none.

    Raises:
        BadInputError: it cannot be read.
    """
    try:
        return file.read_text(encoding="utf-8") if file.exists() else None
    except OSError as error:
        message = f"cannot read {file}: {error.strerror or error}"
    except UnicodeDecodeError:
        message = f"{file}: not UTF-8 text"
    raise BadInputError(message)


def is_in(file: Path) -> bool:
    """Whether the file has settings of this tool already.

    Raises:
        BadInputError: it is not valid TOML; the message has the line.
    """
    return has_table(file)


def text_of(settings: Settings, folder: Path) -> str:
    """The section: a key for each setting that was stated and is no default; paths relative to the repository."""
    lines = []
    for option in OPTIONS:
        if option.key is None or not settings.explicit(option.name) or option.name in {"report", "quiet"}:
            continue
        lines.append(f"{option.key} = {_toml(_within(getattr(settings, option.name), folder))}\n")
    return HEAD + "".join(lines)


def appended(held: str, settings: Settings, folder: Path) -> str:
    """A pyproject.toml with the section at its end, every byte before it as it was."""
    gap = "" if not held else ("\n" if held.endswith("\n") else "\n\n")
    return f"{held}{gap}{text_of(settings, folder)}"


def _within(value: Any, folder: Path) -> Any:
    """Paths below the repository relative to it, so that they hold on another machine."""
    if isinstance(value, tuple):
        return tuple(_within(item, folder) for item in value)
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute()):
        path = Path(value)
        return f"./{path.relative_to(folder)}" if path.is_relative_to(folder) else str(path)
    return value


def _toml(value: Any) -> str:
    """A value in TOML: JSON's texts, numbers, booleans and lists are TOML too."""
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(item) for item in value)}]"
    return json.dumps(value, ensure_ascii=False)
