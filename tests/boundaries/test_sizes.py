"""Files and functions stay small enough to be read at one sitting."""

from __future__ import annotations

from boundaries.source_tree import functions_of, source_files

MOST_LINES = 400
P90_OF_FUNCTIONS = 35


def test_files_are_short() -> None:
    assert not {file.path: file.lines for file in source_files() if file.lines >= MOST_LINES}


def test_functions_are_short() -> None:
    lengths = sorted(
        node.end_lineno - node.lineno + 1
        for file in source_files()
        for node in functions_of(file.tree)
        if node.end_lineno is not None
    )
    assert lengths[int(len(lengths) * 0.9)] <= P90_OF_FUNCTIONS
