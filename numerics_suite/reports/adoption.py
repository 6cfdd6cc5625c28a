"""`init` for a person: each file with what became of it, then what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

from numerics_suite.reports.lines import TerminalLine, wrapped
from numerics_suite.reports.terminal import Terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numerics_suite.adoption.pieces import Piece

STYLES = {"written": "green", "appended": "green", "kept": "dim"}


class AdoptionPrinter(Terminal):
    """Prints what was written, and prints it to a person only."""

    def __init__(self, *, stream: IO[str], quiet: bool = False) -> None:
        """As :class:`Terminal`."""
        super().__init__(stream=stream, quiet=quiet)

    def files(self, pieces: Sequence[Piece], *, dry_run: bool) -> None:
        """One line for each file."""
        for piece in pieces:
            self._told(_state(piece.state, dry_run=dry_run), piece.path, piece.what, piece.state)

    def baseline(self, folder: Path, *, held: bool, wanted: bool, dry_run: bool) -> None:
        """The folder of baselines."""
        if held:
            self._told("kept", folder, "it holds baselines already", "kept")
        elif wanted:
            self._told("would write" if dry_run else "recording", folder, "the first baseline", "written")

    def next_steps(self, pieces: Sequence[Piece], folder: Path, *, dry_run: bool) -> None:
        """What is left to the user."""
        if self._quiet:
            return
        if dry_run:
            self._print(
                [TerminalLine(""), TerminalLine("nothing was written; the same command without --dry-run does it")]
            )
            return
        files = " ".join([*(piece.path.as_posix() for piece in pieces if piece.content is not None), folder.as_posix()])
        steps = [
            TerminalLine(""),
            TerminalLine("next", "bold"),
            TerminalLine("  numerics-suite check"),
            *wrapped("what CI will say; it has to pass before the gate is of use", width=self.width, first="      "),
            TerminalLine(f"  git add {files}"),  # whole, to be copied
            *wrapped("commit it: from now on every pull request is compared with it", width=self.width, first="      "),
        ]
        self._print(steps)

    def _told(self, state: str, path: Path, what: str, style: str) -> None:
        if not self._quiet:
            text = f"{path.as_posix()}: {what}"
            self._print(wrapped(text, width=self.width, first=f"{state:<13}", rest=" " * 13, style=STYLES[style]))


def _state(state: str, *, dry_run: bool) -> str:
    if state == "kept" or not dry_run:
        return state
    return {"written": "would write", "appended": "would append"}[state]
