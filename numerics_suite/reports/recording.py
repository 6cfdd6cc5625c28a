"""The lines of `record`: one for each cell as it is done."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

from numerics_suite.baselines.sampling_error import ROUNDOFF
from numerics_suite.core.text import harmless
from numerics_suite.reports.lines import TerminalLine
from numerics_suite.reports.streams import abandon
from numerics_suite.reports.terminal import Terminal

if TYPE_CHECKING:
    from numerics_suite.baselines.records import CellBaseline, Recorded


class RecordTerminal(Terminal):
    """Prints the cells as they are saved."""

    def __init__(self, *, stream: IO[str], quiet: bool) -> None:
        """As :class:`Terminal`."""
        super().__init__(stream=stream, quiet=quiet)
        self._noun = "cells"

    def cell(self, recorded: Recorded, file: Path | None) -> None:
        """One more cell is done."""
        cell = recorded.cell
        where = f"{cell.subject} {cell.task} {cell.precision} {cell.attn} {cell.device}"
        if recorded.bad_input and not self._quiet:
            self._print([TerminalLine(f"{where}: ERROR {recorded.error}")])  # the command ends with the reason
        elif recorded.error:
            self._tell_error(f"{where}: ERROR {recorded.error}")
        elif recorded.baseline is None:
            self.say(f"{where}: skipped, {recorded.skipped}")
        else:
            self.say(f"{where}: {measured(recorded.baseline)}, {file}")
        if self._live and not self._quiet:
            self._advance(recorded.done, recorded.total)

    def _tell_error(self, text: str) -> None:
        """On standard error, but for the lines above a progress bar."""
        if self._progress is not None:
            self._print([TerminalLine(text)])
            return
        try:
            sys.stderr.write(f"{harmless(text)}\n")
            sys.stderr.flush()
        except OSError:
            abandon(sys.stderr)


def measured(baseline: CellBaseline) -> str:
    """The figures of a cell that a person wants to see: its error in roundoffs and its headroom."""
    roundoffs = baseline.error / ROUNDOFF[baseline.cell.precision]
    module = f" ({baseline.headroom_module})" if baseline.headroom_module else ""
    return f"error {roundoffs:.3g} roundoffs, headroom {baseline.headroom_bits:.1f} bits{module}"
