"""`bisect` for a person and as JSON: one line per version that was tried, then the shortest story."""

from __future__ import annotations

from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from numerics_suite.core.findings import finding_to_json
from numerics_suite.core.numbers import jsonable
from numerics_suite.core.text import listed
from numerics_suite.reports.documents import BisectFile
from numerics_suite.reports.lines import TerminalLine, wrapped
from numerics_suite.reports.terminal import Terminal
from numerics_suite.reports.view.bisections import boundary_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numerics_suite.core.versions import BisectResult, BisectStep

STYLES = {"good": "green", "bad": "bold red", "untestable": "dim"}
KINDS = {"semantic-change": "changed", "rounding-change": "worse", "contract-change": "contract"}
"""A baseline's finding by its cause; every other finding is a failing check of its own."""


class BisectTerminal(Terminal):
    """Prints the versions as they are tried, and the story."""

    def __init__(
        self, *, stream: IO[str], quiet: bool = False, on_steps: Callable[[list[dict[str, Any]]], None] | None = None
    ) -> None:
        """As :class:`Terminal`; `on_steps` takes the entries of `tested` so far, before one is shown."""
        super().__init__(stream=stream, quiet=quiet)
        self._on_steps, self._steps = on_steps, list[dict[str, Any]]()

    def begin(self, what: str, labels: Sequence[str], note: str) -> None:
        """The ends.

        Args:
            what: is searched.
            labels: candidates, the good end first.
            note: a line on their order, empty for none.
        """
        if self._quiet:
            return
        text = f"{what}: {len(labels)} candidates from {labels[0]} (good) to {labels[-1]} (bad)"
        self._print(wrapped(text, width=self.width, rest="  ", style="bold"))
        if note:
            self._print(wrapped(note, width=self.width, first="note: "))

    def doing(self, label: str, what: str) -> None:
        """A version has come to this."""
        if what not in {"environment", "running"}:
            self.notice(f"{label}: {what}")

    def undecided(self) -> None:
        """No check decides between the ends."""
        if not self._quiet:
            text = "no check decides; comparing with a baseline of the good end"
            self._print(wrapped(text, width=self.width, rest="  "))

    def step(self, step: BisectStep) -> None:
        """One more version was tried."""
        self._steps.append(jsonable(asdict(step)))
        if self._on_steps is not None:
            self._on_steps(list(self._steps))
        if self._quiet:
            return
        how = "kept from an earlier run" if step.reused else f"{step.duration_s:.1f} s"
        reason = f": {step.reason}" if step.reason else ""
        text = f"{step.version} ({how}){reason}"
        self._print(wrapped(text, width=self.width, first=f"{step.verdict:<12}", style=STYLES[step.verdict]))

    def deciding(self, checks: Sequence[str], count: int) -> None:
        """The ends hold."""
        if not self._quiet:
            text = f"{listed(list(checks), 3)} decide{'s' if len(checks) == 1 else ''} between {count} candidates"
            self._print(wrapped(text, width=self.width, rest="  "))

    def story(self, result: BisectResult, *, diagnosed: bool = True) -> None:
        """The end of the search."""
        self.stop()
        self._print(
            [*([] if self._quiet else [TerminalLine("")]), *story_lines(result, self.width, diagnosed=diagnosed)]
        )
        if self._error is not None and not isinstance(self._error, BrokenPipeError):
            raise self._error


def story_lines(result: BisectResult, width: int, *, diagnosed: bool = True) -> list[TerminalLine]:
    """The boundary with what happens there and why, facts about it, and the command that shows it.

    Args:
        result: of the search.
        width: in columns.
        diagnosed: False where no cause was looked for.
    """
    found = boundary_of(BisectFile(content=bisect_to_json(result), finding=result.finding), diagnosed=diagnosed)
    lines = wrapped(found.title, width=width, rest="  ", style="bold")
    for label, text in found.facts:
        lines += wrapped(text, width=width, first=f"{label:<11}", style="bold")
    return [*lines, TerminalLine(f"{'show it':<11}{result.show}", "bold", 11)]  # whole, to be copied


def kind_of(result: BisectResult) -> str:
    """`changed`, `worse` or `contract` of a baseline's finding, `failed` of every other."""
    return KINDS.get(result.finding.cause, "failed") if result.finding is not None else "failed"


def bisect_to_json(result: BisectResult) -> dict[str, Any]:
    """The file of `bisect`."""
    return {
        "schema_version": 1,
        "command": "bisect",
        **jsonable(asdict(result)),
        "kind": kind_of(result),
        "finding": None if result.finding is None else finding_to_json(result.finding),
    }
