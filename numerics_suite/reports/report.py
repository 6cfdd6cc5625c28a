"""A report: one folder with the same results in every format that somebody reads."""

from __future__ import annotations

import tempfile
from pathlib import Path

from numerics_suite.core.atomic import ensure_writable, write_atomic
from numerics_suite.core.errors import BadInputError
from numerics_suite.reports.comment import comment_markdown
from numerics_suite.reports.documents import Documents
from numerics_suite.reports.html import write_html
from numerics_suite.reports.junit import junit_xml
from numerics_suite.reports.markdown import summary_markdown
from numerics_suite.reports.plugins import added_reporters, write_added
from numerics_suite.reports.sarif import sarif_text

HTML, JUNIT, SARIF, SUMMARY, COMMENT = "index.html", "junit.xml", "results.sarif", "summary.md", "comment.md"
FILES = (HTML, JUNIT, SARIF, SUMMARY, COMMENT)
"""Written over by the next report; whatever else is in the folder stays."""


def ensure_report(folder: Path, option: str) -> None:
    """See that a report can be written here, and write nothing.

    Raises:
        BadInputError: it cannot be written, or a reporter of another package cannot be used.
    """
    added_reporters()
    try:
        above = next(one for one in (folder, *folder.absolute().parents) if one.exists())
        if not above.is_dir():
            raise NotADirectoryError(20, "Not a directory" if above != folder else "it is a file")
        with tempfile.TemporaryDirectory(dir=above, prefix=".report-"):
            pass
    except OSError as error:
        message = f"{option}: cannot write {folder}: {error.strerror or error}"
        raise BadInputError(message) from None
    if folder.is_dir():
        for name in FILES:
            ensure_writable(folder / name, option)


def write_report(
    folder: Path, documents: Documents, earlier: Documents | None = None, option: str = "--report"
) -> tuple[Path, ...]:
    """Write every file of a report, each whole or not at all; the paths of all of them.

    Args:
        folder: made where it is missing.
        documents: everything that the report covers.
        earlier: what the comment holds them against.
        option: the option that named the folder, for messages.

    Raises:
        BadInputError: a file cannot be written, or a reporter of another package fails.
    """
    texts: dict[str, str | bytes] = {
        JUNIT: junit_xml(documents),
        SARIF: sarif_text(documents),
        SUMMARY: summary_markdown(documents),
        COMMENT: comment_markdown(documents, earlier),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{option}: cannot write {folder}: {error.strerror or error}"
        raise BadInputError(message) from None
    written = [write_html(folder, documents)]
    for name, text in texts.items():
        write_atomic(folder / name, text, option)
        written.append(folder / name)
    return (*written, *write_added(documents, folder))


def ensure_wanted(report: Path | None, junitxml: Path | None, prefix: str = "--") -> None:
    """Before hours of work, see that what was asked for can be written.

    Args:
        report: folder of a report, None for none.
        junitxml: a JUnit file, None for none.
        prefix: of the options' names, for messages.

    Raises:
        BadInputError: one cannot be written.
    """
    if report is not None:
        ensure_report(report, f"{prefix}report")
    if junitxml is not None:
        ensure_writable(junitxml, f"{prefix}junitxml")


def write_wanted(documents: Documents, report: Path | None, junitxml: Path | None, prefix: str = "--") -> None:
    """Write what was asked for.

    Raises:
        BadInputError: one cannot be written.
    """
    if junitxml is not None:  # first, since it needs no reporter of another package
        write_atomic(junitxml, junit_xml(documents), f"{prefix}junitxml")
    if report is not None:
        write_report(report, documents, option=f"{prefix}report")
