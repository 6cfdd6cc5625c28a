"""The code blocks of README and docs, each with the marks that stand above it.

A mark is an HTML comment, which no reader sees:

- `<!-- not run: REASON -->`: the block below is not executed;
- `<!-- not run, lines with TEXT: REASON -->`: its lines that hold TEXT are not;
- `<!-- exit: 1 -->`: the commands below end with that status.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sybil import Document, Region, Sybil
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

ROOT = Path(__file__).resolve().parents[2]

BLOCK = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[\w-]*)[ \t]*(?P<rest>[^\n]*)\n"))
TITLE = re.compile(r'title="([^"]+)"')
MARK = re.compile(r"<!-- (?P<key>[^:>]+?)(?:: (?P<value>.*?))? -->")
NOT_RUN, LINES, EXIT = "not run", "not run, lines with ", "exit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block.

    Attributes:
        page: its path from the repository's root.
        line: of the opening fence, from 1.
        language: `bash`, `text`, `python`, …; empty for none.
        title: of the fence: the file whose content it is, empty for none.
        text: what stands between the fences.
        marks: the comments directly above it, by key.
    """

    page: str
    line: int
    language: str
    title: str
    text: str
    marks: dict[str, str]

    @property
    def place(self) -> str:
        """`docs/watch.md:12`."""
        return f"{self.page}:{self.line}"

    @property
    def status(self) -> int:
        """What its commands end with."""
        return int(self.marks.get(EXIT, "0"))

    @property
    def left_out(self) -> tuple[str, ...]:
        """Texts of lines that are not run."""
        return tuple(key.removeprefix(LINES) for key in self.marks if key.startswith(LINES))

    def runnable(self) -> str:
        """Its commands without those that are marked; every continued line goes with its command."""
        return "\n".join(line for line in commands(self.text) if not self.leaves_out(line))

    def leaves_out(self, command: str) -> bool:
        """Whether this command of the block is marked as not run."""
        return NOT_RUN in self.marks or any(text in command for text in self.left_out)


def commands(text: str) -> tuple[str, ...]:
    """The commands of a block of bash, continued lines and here-documents joined to theirs."""
    found: list[str] = []
    until = ""
    for line in text.splitlines():
        joined = bool(found) and (bool(until) or found[-1].endswith("\\"))
        if joined:
            found[-1] += f"\n{line}"
        elif line.strip():
            found.append(line)
        if until:
            until = "" if line == until else until
        elif here := re.search(r"<<\s*'?(\w+)'?", line):
            until = here[1]
    return tuple(found)


def page_paths() -> tuple[str, ...]:
    """Every page that a reader meets: README and docs/, in both languages."""
    pages = (*sorted(ROOT.glob("README*.md")), *sorted(ROOT.glob("docs/**/*.md")))
    return tuple(path.relative_to(ROOT).as_posix() for path in pages)


@cache
def blocks_of(page: str) -> tuple[Block, ...]:
    """The blocks of a page, in order.

    Args:
        page: path from the repository's root, or a whole one.
    """
    document = Sybil(parsers=[_parse], patterns=["*.md"]).parse(ROOT / page)
    return tuple(example.parsed for example in document.examples())


def _parse(document: Document) -> Iterable[Region]:
    path = Path(document.path).resolve()
    page = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    for region in BLOCK(document):
        title = TITLE.search(region.lexemes["rest"])
        block = Block(
            page=page,
            line=document.text.count("\n", 0, region.start) + 1,
            language=region.lexemes["language"],
            title=title[1] if title else "",
            text=str(region.lexemes["source"]),
            marks=dict(_marks_above(document.text[: region.start])),
        )
        yield Region(region.start, region.end, parsed=block, evaluator=lambda _: None)


def _marks_above(text: str) -> Iterator[tuple[str, str]]:
    """The comments between what stands above and the fence."""
    for line in reversed(text.rstrip("\n").splitlines()):
        mark = MARK.fullmatch(line.strip())
        if mark is None:
            return
        yield mark["key"], (mark["value"] or "").strip()
