"""A translation has the code blocks of its original, in the same order: commands, files and outputs are in no language."""

from __future__ import annotations

import re

import pytest
from docs.pages import ROOT, blocks_of

TRANSLATED = sorted(
    path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.zh.md"), *ROOT.glob("docs/**/*.zh.md"))
)


def original(page: str) -> str:
    return page.replace(".zh.md", ".md")


def test_the_pages_that_newcomers_read_are_translated():
    assert {"README.zh.md", "docs/tutorial.zh.md"} <= set(TRANSLATED)


@pytest.mark.parametrize("page", TRANSLATED)
def test_blocks_are_those_of_the_original(page):
    def blocks(name: str) -> list[tuple[str, str, str]]:
        return [(block.language, block.title, block.text) for block in blocks_of(name)]

    for translated, wanted in zip(blocks(page), blocks(original(page)), strict=True):
        assert translated == wanted


@pytest.mark.parametrize("page", TRANSLATED)
def test_headings_and_tables_are_as_many(page):
    """What the original gained since must be told in the translation too."""

    def shape(name: str) -> list[str]:
        text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        return re.findall(r"^(#+ |\|)", text, re.MULTILINE)

    assert shape(page) == shape(original(page))


@pytest.mark.parametrize("page", TRANSLATED)
def test_it_links_to_what_the_original_links_to(page):
    def links(name: str) -> set[str]:
        targets = re.findall(r"\]\(([^)\s#]+)", (ROOT / name).read_text(encoding="utf-8"))
        return {target.replace(".zh.md", ".md") for target in targets} - {"README.md"}

    assert links(page) == links(original(page))
