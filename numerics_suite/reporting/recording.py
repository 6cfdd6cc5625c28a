"""The lines of `record`: one for each cell as it is done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from numerics_suite.baselines.draws import ROUNDOFF
from numerics_suite.reporting.streams import abandon

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from numerics_suite.baselines.records import CellBaseline, Recorded


class RecordPrinter:
    """Prints one recording; a reader that is gone never stops it."""

    def __init__(self, *, stream: IO[str], quiet: bool) -> None:
        """Show live progress only where the stream is a terminal.

        Args:
            stream: standard output, or standard error where the answer goes to standard output.
            quiet: errors only.
        """
        self._stream, self._quiet = stream, quiet
        self._live = not quiet and bool(getattr(stream, "isatty", lambda: False)())
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def cell(self, recorded: Recorded, file: Path | None) -> None:
        """One more cell is done.

        Args:
            recorded: how it went.
            file: where it was saved.
        """
        cell = recorded.cell
        where = f"{cell.subject} {cell.task} {cell.precision} {cell.attn} {cell.device}"
        if recorded.error:
            self._print(f"{where}: ERROR {recorded.error}", sys.stderr)
        elif not self._quiet:
            self._print(f"{where}: {self._told(recorded, file)}", self._stream)
        if self._live:
            self._advance(recorded.done, recorded.total)

    @staticmethod
    def _told(recorded: Recorded, file: Path | None) -> str:
        if recorded.baseline is None:
            return f"skipped, {recorded.skipped}"
        return f"{measured(recorded.baseline)}, {file}"

    def _print(self, line: str, stream: IO[str]) -> None:
        try:
            if self._progress is not None:
                self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
                return
            stream.write(f"{line}\n")
            stream.flush()
        except OSError:
            abandon(stream)

    def _advance(self, done: int, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        if self._progress is None:
            columns = (TextColumn("cells"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._progress.add_task("cells", total=total)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, completed=done)

    def stop(self) -> None:
        """Take the progress bar away; more than once is no harm."""
        if self._progress is not None:
            progress, self._progress = self._progress, None
            progress.stop()


def measured(baseline: CellBaseline) -> str:
    """The figures of a cell that a person wants to see: its error in roundoffs and its headroom.

    Args:
        baseline: of the cell.
    """
    roundoffs = baseline.error / ROUNDOFF[baseline.cell.precision]
    module = f" ({baseline.headroom_module})" if baseline.headroom_module else ""
    return f"error {roundoffs:.3g} roundoffs, headroom {baseline.headroom_bits:.1f} bits{module}"
