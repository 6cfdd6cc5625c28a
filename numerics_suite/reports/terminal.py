"""The terminal: a header, live progress, and the end of the run; plain lines without a terminal."""

from __future__ import annotations

import errno
import time
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from numerics_suite import __version__
from numerics_suite.core import activity
from numerics_suite.core.text import listed
from numerics_suite.reports.lines import WIDTH, TerminalLine, sayable, wrapped
from numerics_suite.reports.plan import PlanRow, about_seconds, plan_lines, readable_seconds
from numerics_suite.reports.rehearsal import rehearsal_lines
from numerics_suite.reports.streams import abandon, notice
from numerics_suite.reports.summary import LABELS, STYLES, summary
from numerics_suite.reports.view.formats import many

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.progress import Progress, TaskID

    from numerics_suite.core.records import Cell, CheckResult, RunResult, Subject
    from numerics_suite.core.rehearsal import Rehearsal

__all__ = ["PlanRow", "Terminal"]

WIDEST = 100
"""Columns that are used at most; longer lines are hard to read."""

COLOURS = {
    "red": "color(196)",
    "green": "color(28)",
    "yellow": "color(130)",
    "cyan": "color(30)",
    "magenta": "color(163)",
}
"""Of the 256 colours those that read on white and on black alike: the 16 are whatever a terminal's owner made of them, and
its yellow or cyan on white is often not there at all."""


class _Console(Console):
    """rich's console, without its habit of ending the process when the reader is gone."""

    def on_broken_pipe(self) -> None:
        """Hand the error on."""
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


class Terminal:
    """Prints one run to one stream; a reader that is gone never stops the run."""

    def __init__(self, *, stream: IO[str], quiet: bool = False, verbose: bool = False) -> None:
        """Print to `stream`; colour and live progress only where it is a terminal.

        Args:
            stream: standard output, or standard error where the results go to standard output.
            quiet: the verdict and the sentences of findings only.
            verbose: of findings everything that was measured.
        """
        self._stream, self._quiet, self._verbose = stream, quiet, verbose
        self._live = bool(getattr(stream, "isatty", lambda: False)())
        _tolerate(stream)
        self._console = _Console(
            file=stream,
            force_terminal=self._live,
            force_jupyter=False,
            markup=False,
            emoji=False,
            highlight=False,
            legacy_windows=False,
            width=None if self._live else WIDTH,
        )
        self.width = min(self._console.width, WIDEST) if self._live else WIDTH
        self._noun = "checks"
        self._error: OSError | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._shown: set[tuple[str, ...]] = set()
        self._failed = 0
        self._said, self._tenth = time.monotonic(), 0
        self._began = self._said
        self._at_work: Callable[[], Sequence[object]] = tuple
        self._left: Callable[[], float | None] = _unknown

    def header(  # noqa: PLR0913 - a line for each
        self,
        environment: Mapping[str, Any],
        subjects: Sequence[Subject],
        cells: Sequence[Cell],
        settings: Mapping[str, Any],
        *,
        data: str = "",
        seconds: float | None = None,
    ) -> None:
        """What will be run, on what, by what.

        Args:
            environment: of the results file.
            subjects: resolved.
            cells: planned.
            settings: of the results file.
            data: what is taken of `--data`.
            seconds: that it is expected to take.
        """
        if self._quiet:
            return
        packages = environment.get("packages", {})
        versions = [f"{name} {packages[name]}" for name in ("torch", "transformers") if name in packages]
        title = ", ".join([f"numerics-suite {__version__}", f"python {environment.get('python', '?')}", *versions])
        lines = wrapped(title, width=self.width, rest="  ", style="bold")
        lines += self._labelled("device", str(environment.get("device", "?")))
        added = [f"{name} {version}" for name, version in environment.get("extensions", {}).items()]
        lines += self._labelled("extensions", ", ".join(added))
        for index, subject in enumerate(subjects):
            lines += self._labelled("subjects" if index == 0 else "", _subject_text(subject))
        for label, names in (("precisions", "precision"), ("attention", "attn")):
            lines += self._labelled(label, ", ".join(dict.fromkeys(getattr(cell, names) for cell in cells)))
        lines += self._labelled("data", data)
        lines += self._labelled("plan", _plan_text(cells, settings, seconds))
        # One line each, however long: it is searched for.
        lines += [
            TerminalLine(f"{'note':<12}{subject.id}: {note}", "yellow")
            for subject in subjects
            for note in subject.notes
        ]
        self._print(lines)

    def _labelled(self, label: str, text: str) -> list[TerminalLine]:
        return wrapped(text, width=self.width, first=f"{label:<12}", style="cyan") if text else []

    def follow(self, total: int, at_work: Callable[[], Sequence[object]], left: Callable[[], float | None]) -> None:
        """Show from now on what is being asked, and how long the rest will take.

        Args:
            total: results expected.
            at_work: what each process is at, in words; asked several times a second, from another thread.
            left: seconds until the last result.
        """
        self._at_work, self._left = at_work, left
        if self._live and not self._quiet and self._error is None:
            self._advance(0, total)

    def progress(self, done: int, total: int, result: CheckResult) -> None:
        """One more result is there."""
        if result.status in {"failed", "error"}:
            self._failed += 1
        if self._quiet or self._error is not None:
            return
        if self._live:
            self._advance(done, total)
        self._tell(result)
        if not self._live:
            self._say_sparsely(done, total)

    def _tell(self, result: CheckResult) -> None:
        """A line for the first finding or error of its kind; its copies in other cells are counted at the end."""
        if result.status not in {"failed", "error"}:
            return
        finding = result.finding
        # What fails and not yet why: the end of the run gives the cause, with everything that follows from it.
        what = finding.title if finding is not None else result.reason or ""
        cause = finding.cause if finding is not None else what
        # Where no model can be loaded, every check says the same.
        key = ("" if result.bad_input else result.check, result.cell.subject, cause)
        if key in self._shown:
            return
        self._shown.add(key)
        first = f"{LABELS[result.status]:<5}"
        text = f"{result.check} {result.cell.id}: {what}"
        self._print(wrapped(text, width=self.width, first=first, style=STYLES[result.status]))

    def _say_sparsely(self, done: int, total: int) -> None:
        now, tenth = time.monotonic(), 10 * done // max(total, 1)
        if tenth > self._tenth and now - self._said >= activity.FIRST:
            self._said, self._tenth = now, tenth
            left = self._left()
            rest = "" if left is None or done == total else f", {about_seconds(left)} left"
            text = f"{done} of {total} checks, {self._failed} not passed, {now - self._began:.0f} s{rest}"
            self.notice(text)

    def _advance(self, done: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

        class Live(ProgressColumn):
            """Words that may change between two results."""

            def __init__(self, words: Callable[[], str]) -> None:
                super().__init__()
                self.words = words

            def render(self, task: object) -> Text:  # noqa: ARG002 - rich's signature
                return Text(self.words(), no_wrap=True, overflow="ellipsis")

        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn())
            rest = (TimeElapsedColumn(), Live(self._left_words), Live(self._work_words))
            self._progress = Progress(*columns, *rest, console=self._console, transient=True)
            self._task = self._progress.add_task(self._noun, total=total)
            self._progress.start()
        assert self._task is not None
        description = f"{self._noun}, {self._failed} not passed" if self._failed else self._noun
        self._progress.update(self._task, completed=done, total=total, description=description)

    def _left_words(self) -> str:
        left = self._left()
        return "" if left is None else f"{readable_seconds(left)} left"

    def _work_words(self) -> str:
        now = [str(one) for one in self._at_work()]
        return "" if not now else sayable(now[0] if len(now) == 1 else f"{now[0]} (+{len(now) - 1})", self._stream)

    def say(self, text: str) -> None:
        """One line of the run."""
        if not self._quiet:
            self._print([TerminalLine(text)])

    def notice(self, text: str) -> None:
        """One line on how far long work is: above the progress bar, or on standard error."""
        if self._quiet:
            return
        if self._live:
            self._print(wrapped(text, width=self.width, rest="  ", style="dim"))
        else:
            notice(text)

    def rehearsals(self, rehearsals: Sequence[Rehearsal]) -> None:
        """Training tried on the user's own texts, and what it recommends."""
        self._print(rehearsal_lines(rehearsals, width=self.width))

    def stop(self) -> None:
        """Take the progress bar away; more than once is no harm."""
        if self._progress is not None:
            progress, self._progress = self._progress, None
            try:
                progress.stop()
            except OSError as error:
                self._give_up(error)

    def summary(self, run: RunResult) -> None:
        """The end of the run.

        Raises:
            OSError: the disk under the stream is full.
        """
        self.stop()
        begin = [] if self._quiet else [TerminalLine("")]
        self._print([*begin, *summary(run, width=self.width, quiet=self._quiet, verbose=self._verbose)])
        if self._error is not None and not isinstance(self._error, BrokenPipeError):
            raise self._error

    def show(self, lines: Sequence[TerminalLine]) -> None:
        """Any lines, in their styles."""
        self._print(lines)

    def plan(self, rows: Sequence[PlanRow], seconds: float | None = None) -> None:
        """What `--list` shows."""
        self._print(plan_lines(rows, seconds))

    def _print(self, lines: Sequence[TerminalLine]) -> None:
        if self._error is not None:
            return
        try:
            for line in lines:
                text = Text(sayable(line.text, self._stream))
                if line.style:
                    text.stylize(_coloured(line.style), 0, line.styled if line.styled is not None else len(text))
                self._console.print(text, soft_wrap=True)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Print no more, and let the run go on: its answer is also in the exit status and the results file."""
        self._error = error
        abandon(self._stream)


def _unknown() -> None:
    """Nobody said how long it takes."""


def _coloured(style: str) -> str:
    return " ".join(COLOURS.get(word, word) for word in style.split())


def _tolerate(stream: IO[str]) -> None:
    """Let a stream that cannot say a letter show its code instead of failing."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None and "utf" not in str(getattr(stream, "encoding", "")).lower():
        reconfigure(errors="backslashreplace")


def _subject_text(subject: Subject) -> str:
    facts = [
        subject.family,
        subject.task + (" with a new head" if subject.new_head else ""),
        subject.stored_dtype or "",
        f"{subject.parameters:,} parameters" if subject.parameters is not None else "",
        f"revision {subject.revision}" if subject.revision else "",
        "quantised" if subject.quantized else "",
    ]
    name = subject.id if subject.source in {subject.id, f"fixture:{subject.id}"} else f"{subject.id} = {subject.source}"
    return f"{name}: {listed([fact for fact in facts if fact], 6)}"


def _plan_text(cells: Sequence[Cell], settings: Mapping[str, Any], seconds: float | None) -> str:
    trained = f"{settings.get('steps')} steps of {settings.get('optimizer')} at lr {settings.get('lr')}"
    asked = "max_examples" in settings.get("origins", {})
    how = f"{settings.get('max_examples')} examples" if asked else f"{settings.get('effort')} effort"
    drawn = f"{how}, seed {settings.get('seed')}"
    expected = "" if seconds is None else f"; {about_seconds(seconds)} on an idle machine"
    return f"{many(len(cells), 'cell')}; {drawn}; {trained}{expected}"
