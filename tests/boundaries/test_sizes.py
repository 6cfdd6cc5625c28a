"""Files and functions stay small enough to be read at one sitting."""

from __future__ import annotations

from boundaries.source_tree import functions_of, source_files

MOST_LINES = 400
MOST_FILES_OVER_WITH_REASON = {
    "numerics_suite/running/_lifting.py": 500,  # one table of torch's ops, which reads best in one piece
}
P90_OF_FUNCTIONS = 35


def test_files_are_short() -> None:
    long = {
        file.path: file.lines
        for file in source_files()
        if file.lines >= MOST_FILES_OVER_WITH_REASON.get(file.path, MOST_LINES)
    }
    assert not long


def test_exceptions_are_still_needed() -> None:
    lengths = {file.path: file.lines for file in source_files()}
    assert all(lengths.get(path, 0) >= MOST_LINES for path in MOST_FILES_OVER_WITH_REASON)


def test_functions_are_short() -> None:
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for file in source_files()
        for node in functions_of(file.tree)
        if node.end_lineno is not None
    )
    assert lengths[int(len(lengths) * 0.9)] <= P90_OF_FUNCTIONS
