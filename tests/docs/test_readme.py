"""What README promises its reader: one sitting, short sentences, and pictures of what the tool really prints."""

from __future__ import annotations

import html
import re

import pytest
from docs.pages import ROOT, blocks_of

LINES, WORDS, KILOBYTES = 150, 30, 150
README = (ROOT / "README.md").read_text(encoding="utf-8")


def sentences(markdown: str) -> list[str]:
    """The sentences of the running text, of list items and of each cell of a table; no code blocks and no link targets.

    Args:
        markdown: a page.
    """
    text = re.sub(r"^```.*?^```", "\n", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)", "\n", text)
    text = re.sub(r"`([^`]*)`", lambda code: code[1].replace(".", "·").replace("|", "·"), text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^(#.*)$", r"\n\1\n", text, flags=re.MULTILINE)
    text = re.sub(r"\n(?=[-*] |\|)", "\n\n", text)
    paragraphs = (part for block in re.split(r"\n\s*\n", text) for part in re.split(r"\||\s·\s", block))
    return [
        " ".join(sentence.split()) for part in paragraphs for sentence in re.split(r"(?<=[.!?])\s", part.lstrip("# -"))
    ]


def long_sentences(markdown: str) -> list[str]:
    return [sentence for sentence in sentences(markdown) if len(sentence.split()) > WORDS]


def test_it_is_short():
    assert len(README.splitlines()) <= LINES


def test_no_sentence_is_long():
    assert long_sentences(README) == []


@pytest.mark.parametrize("where", ["{}.", "- one\n- {}", "| a | {} |", "one.\n\n{}.", "# a\n{}\n"])
def test_a_long_sentence_is_found_wherever_it_stands(where):
    assert len(long_sentences(where.format(" ".join(["word"] * WORDS)))) == 0
    assert len(long_sentences(where.format(" ".join(["word"] * (WORDS + 1))))) == 1


def test_it_has_exactly_two_commands_to_set_up():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[1].endswith('-n auto --dist loadgroup -m "not slow"')


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert {path.rpartition(".")[2] for path in pictures} == {"svg", "png"}
    for path in pictures:
        assert (ROOT / path).stat().st_size < 1024 * KILOBYTES, path


def test_the_picture_of_the_terminal_shows_what_the_example_prints():
    """The example's text is compared with a real run, and the picture with the text."""
    shown = next(block for block in blocks_of("README.md") if block.language == "text")
    picture = (ROOT / "docs/assets/finding.svg").read_text(encoding="utf-8")
    rows: dict[str, str] = {}
    for row, text in re.findall(r'<text [^>]*\by="([\d.]+)"[^>]*>([^<]*)</text>', picture):
        rows[row] = rows.get(row, "") + html.unescape(text)
    drawn = {" ".join(row.split()) for row in rows.values()}
    lines = {" ".join(line.split()) for line in shown.text.splitlines()} - {"…"}
    assert lines <= drawn
