"""The project's own words are explained once, in docs/glossary.md, and a page links a word where it first uses it."""

from __future__ import annotations

import re

import pytest
from docs.pages import ROOT, page_paths
from docs.test_links import anchors

GLOSSARY = "docs/glossary.md"
EVERYWHERE = {
    "true fp64 run": r"true (?:fp64|float64)",
    "rounded run": r"rounded runs?",
    "inherent error": r"inherent errors?",
    "kernel ratio": r"kernel ratios?",
    "unit roundoff": r"(?:unit )?roundoffs?",
    "law": r"laws?",
    "bundle": r"bundles?",
    "mutant": r"mutants?",
    "baseline": r"baselines?",
    "rehearsal": r"rehears(?:e|es|al)",
    "headroom": r"headroom",
}
"""Words by anchor that are in no dictionary in this sense: every page links them."""

IN_README = EVERYWHERE | {
    "subject": r"subjects?",
    "factory": r"factor(?:y|ies)",
    "fixture": r"fixtures?",
    "family": r"famil(?:y|ies)",
    "cell": r"cells?",
    "finding": r"findings?",
    "root": r"root findings?",
    "cause": r"causes?",
    "remedy": r"remed(?:y|ies)",
    "reproducer": r"reproducers?",
    "accepted": r"accepted",
    "definition": r"definitions?",
    "budget": r"budgets?",
}
"""Those, and ordinary words with a narrower meaning here: README links all of them."""

EXPLAINS = {"docs/theory.md": set(EVERYWHERE), "docs/watch.md": {"bundle"}}
"""Pages that are themselves the explanation of these words."""

WRITTEN = {f"docs/{name}.md" for name in ("accelerator", "constants", "locating", "mutants", "versions")}
"""Tables that commands of the repository write."""

PAGES = sorted({*page_paths(), "ARCHITECTURE.md", "CONTRIBUTING.md"} - {GLOSSARY} - WRITTEN)
ENGLISH = [page for page in PAGES if not page.endswith(".zh.md")]


def prose(markdown: str) -> str:
    """A page without what cannot hold a link: code, pictures, comments and headings."""
    text = re.sub(r"^ *```.*?^ *```", "", markdown, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)|^#.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "``", text)


def unlinked(markdown: str, words: dict[str, str]) -> list[str]:
    """Words whose first use on a page is not within a link.

    Args:
        markdown: the page.
        words: pattern by word.
    """
    text = prose(markdown)
    links = [(found.start(1), found.end(1)) for found in re.finditer(r"\[([^\]]*)\]\([^)]*\)", text)]
    text = re.sub(r"\]\([^)]*\)", lambda target: "]" + "_" * (len(target[0]) - 1), text)
    return [
        word
        for word, pattern in words.items()
        if (first := re.search(rf"(?<![\w-]){pattern}(?![\w-])", text, re.IGNORECASE))
        and not any(start <= first.start() and first.end() <= end for start, end in links)
    ]


def test_readme_links_every_word_of_its_own():
    assert unlinked((ROOT / "README.md").read_text(encoding="utf-8"), IN_README) == []


@pytest.mark.parametrize("page", [page for page in ENGLISH if page != "README.md"])
def test_a_page_links_the_words_that_no_dictionary_has(page):
    words = {word: pattern for word, pattern in EVERYWHERE.items() if word not in EXPLAINS.get(page, ())}
    assert unlinked((ROOT / page).read_text(encoding="utf-8"), words) == []


def test_the_glossary_explains_each_of_them():
    explained = anchors((ROOT / GLOSSARY).read_text(encoding="utf-8"))
    assert {word.replace(" ", "-") for word in IN_README} <= explained


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ("A [law](docs/glossary.md#law) holds. A law.", []),
        ("A law holds. See [law](docs/glossary.md#law).", ["law"]),
        ("# A law\n\nA law.", ["law"]),
        ("# A law\n\n```\na law\n```\n\n`law` and ![law](law.png), lawful [x](law.md).", []),
        ("See [the\nlaws of rows](theory.md#laws), then laws.", []),
        ("| law | x |", ["law"]),
    ],
)
def test_a_word_without_a_link_is_found(page, found):
    assert unlinked(page, {"law": r"laws?"}) == found
