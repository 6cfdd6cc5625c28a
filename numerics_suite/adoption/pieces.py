"""The pieces of an adopted gate: what each would write, and what is there already and stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from numerics_suite.adoption import section, workflows
from numerics_suite.core.atomic import write_atomic
from numerics_suite.core.errors import BadInputError
from numerics_suite.settings.tree import Settings

State = Literal["written", "appended", "kept"]

KEPT_BY_GIT = """\
# Baselines are made to be committed; everything else here is made anew by any run.
/*
!/.gitignore
!/baselines/
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One file of the adopted gate.

    Attributes:
        path: relative to the repository.
        content: the whole file as it will be, None where it stays as it is.
        state: what becomes of it.
        what: what it is for, or why it stays; half a sentence.
    """

    path: Path
    content: str | None
    state: State
    what: str


def pieces_of(folder: Path, settings: Settings, host: workflows.Host | None) -> tuple[Piece, ...]:
    """Everything that adopting would write into a repository; nothing is written yet.

    Raises:
        BadInputError: a file of the repository cannot be read.
    """
    found = [
        _section(folder, settings),
        _new(folder, Path(".numerics/.gitignore"), lambda: KEPT_BY_GIT, "what git keeps"),
    ]
    if host is not None:
        path = workflows.place_of(folder, host)
        found.append(_new(folder, path, lambda: workflows.text_of(folder, host), workflows.meaning_of(path)))
    return tuple(found)


def write(folder: Path, pieces: tuple[Piece, ...]) -> None:
    """Write what is not there, each file whole or not at all.

    Raises:
        BadInputError: one cannot be written; the message names it.
    """
    for piece in pieces:
        if piece.content is None:
            continue
        target = folder / piece.path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"cannot make the folder {target.parent}: {error.strerror or error}"
            raise BadInputError(message) from None
        write_atomic(target, piece.content)


def _section(folder: Path, settings: Settings) -> Piece:
    path = Path("pyproject.toml")
    held = section.text_in(folder / path)
    if held is None:
        return Piece(path=path, content=section.text_of(settings, folder), state="written", what="the gate's settings")
    if section.is_in(folder / path):
        return Piece(path=path, content=None, state="kept", what="it has a [tool.numerics-suite] already")
    return Piece(
        path=path, content=section.appended(held, settings, folder), state="appended", what="[tool.numerics-suite]"
    )


def _new(folder: Path, path: Path, content: Callable[[], str], what: str) -> Piece:
    if (folder / path).exists():
        return Piece(path=path, content=None, state="kept", what="it is there already")
    return Piece(path=path, content=content(), state="written", what=what)
