"""Standard output and files: an answer reaches its reader whole, or the command says why not."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from numerics_suite.core.text import harmless

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from numerics_suite.reports.documents import Documents
    from numerics_suite.settings.tree import Settings


def say(line: str) -> None:
    """One line of the answer, on standard output."""
    try:
        sys.stdout.write(f"{harmless(line)}\n")
    except BrokenPipeError:
        from numerics_suite.reports.streams import abandon

        abandon(sys.stdout)


def refuse_unwritable(target: str | None) -> None:
    """Before hours of work, see that the answer will have a place.

    Raises:
        BadInputError: it has none.
    """
    if target and target != "-":
        from numerics_suite.core.atomic import ensure_writable

        ensure_writable(Path(target), "--json")


VERDICTS = {0: "pass", 1: "fail"}
"""Of the exit statuses; any other is an `error`."""


def write_json(target: str, content: Mapping[str, Any], status: int | None = None) -> None:
    """The answer as JSON, with `complete` and `verdict` of the exit status where the command's own document has none.

    Raises:
        BadInputError: it cannot be written.
    """
    from numerics_suite.core.atomic import write_atomic
    from numerics_suite.core.errors import BadInputError
    from numerics_suite.reports.results import dump

    if status is not None:
        content = {"complete": True, "verdict": VERDICTS.get(status, "error"), **content}
    if target != "-":
        write_atomic(Path(target), dump(content), "--json")
        return
    try:
        sys.stdout.write(dump(content))
        sys.stdout.flush()
    except OSError as error:
        from numerics_suite.reports.streams import abandon

        abandon(sys.stdout)
        if isinstance(error, BrokenPipeError):
            return  # its reader has seen enough; the verdict is in the exit status
        message = f"--json: cannot write to standard output: {error.strerror}"
        raise BadInputError(message) from None


@contextmanager
def unfinished_answer(target: str | None, command: str, **content: Any) -> Iterator[Callable[..., None]]:
    """A document that says that the command has not come to its end, for as long as it runs, and after an interrupt.

    Yields:
        Called with newer content, which is in the file within a second.
    """
    from numerics_suite.core.answer_file import AnswerFile
    from numerics_suite.core.errors import BadInputError
    from numerics_suite.reports.results import dump, unfinished

    file = AnswerFile(target)

    def offer(**newer: Any) -> None:
        document = unfinished(command, **{**content, **newer})
        file.offer(lambda: dump(document))

    offer()
    try:
        yield offer
    except BadInputError:
        file.withdraw()
        raise
    finally:
        file.close()


@contextmanager
def only_json_on_stdout() -> Iterator[None]:
    """Whatever libraries, remote code and worker processes print goes to standard error while this lasts."""
    sys.stdout.flush()
    kept_stream = sys.stdout
    try:
        kept = os.dup(1)
    except OSError:  # no descriptor 1: nothing can print there
        yield
        return
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = kept_stream
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def for_people(settings: Settings) -> Iterator[IO[str]]:
    """The stream for everything but the answer: standard error where the answer has standard output to itself."""
    if settings.json == "-":
        with only_json_on_stdout():
            yield sys.stderr
    else:
        yield sys.stdout


def refuse_undeliverable(report: Path | None, junitxml: Path | None = None) -> None:
    """Before hours of work, see that the report will have a place.

    Raises:
        BadInputError: it has none.
    """
    if report is not None or junitxml is not None:
        from numerics_suite.reports.report import ensure_wanted

        ensure_wanted(report, junitxml)


def deliver(documents: Documents, report: Path | None, junitxml: Path | None = None, *, silent: bool) -> None:
    """The report and the JUnit file that were asked for, and in GitHub Actions annotations and the step's summary.

    Args:
        documents: to report.
        report: `--report`.
        junitxml: `--junitxml`.
        silent: standard output is the answer's, or nothing is to be printed that was not asked for.

    Raises:
        BadInputError: a file cannot be written.
    """
    from numerics_suite.reports.github import tell_github
    from numerics_suite.reports.report import HTML, write_wanted

    write_wanted(documents, report, junitxml)
    if report is not None and not silent:
        say(f"report: {report / HTML}")
    tell_github(documents, None if silent else sys.stdout)
