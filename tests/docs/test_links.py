"""Links between the pages of the repository lead to files and headings that exist, and names of the tool are its names.

mkdocs holds the site to the same, where it is installed; this is what a reader on GitHub meets.
"""

from __future__ import annotations

import re

import pytest
from docs.pages import ROOT, page_paths

from numerics_suite.core.registry import GROUPS, check_ids
from numerics_suite.settings.table import OPTIONS

PAGES = sorted({*page_paths(), *(path.name for path in ROOT.glob("*.md"))})

GENERATED = re.compile(r"reference/[\w.-]+\.(md|json)$")
"""Pages that tools/reference.py makes when the site is built."""


@pytest.fixture(scope="module")
def texts():
    return {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page, texts):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(texts[page])):
        if re.match(r"https?:", target):
            continue
        name, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / name).resolve() if name else ROOT / page
        relative = path.relative_to(ROOT).as_posix()
        if GENERATED.search(relative):
            continue
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("page", PAGES)
def test_checks_and_options_that_a_page_names_exist(page, texts):
    text = texts[page]
    named = set(re.findall(rf"`((?:{'|'.join(GROUPS)})\.(?!py`)[a-z]+(?:-[a-z]+)*)`", text))
    assert named <= {*check_ids(), *EXAMPLES}
    twins = set(re.findall(r"--numerics-[a-z-]+[a-z]", text))
    known = {option.twin for option in OPTIONS}
    switches = {option.twin.replace("--numerics-", "--numerics-no-") for option in OPTIONS if option.form == "switch"}
    assert twins <= known | switches


EXAMPLES = {"inputs.strides"}
"""Checks that a page makes up to show how one is added."""


@pytest.mark.parametrize("page", ["docs/limits.md", "docs/howto/add-a-family.md"])
def test_the_share_of_mutants_that_is_caught_is_that_of_their_table(page: str) -> None:
    def figures(pattern: str, text: str) -> list[tuple[str, ...]]:
        return re.findall(pattern, text, re.DOTALL)

    table = (ROOT / "docs" / "mutants.md").read_text(encoding="utf-8")
    ((caught, total),) = figures(r"\| caught \| (\d+) of (\d+) ", table)
    ((without, _),) = figures(r"\| caught without the oracle[^|]*\| (\d+) of (\d+) ", table)
    said = figures(
        r"[Oo]f (\d+) \[mutants\].{0,60}?(\d+) are caught with .{0,20}?and (\d+)\s+without",
        (ROOT / page).read_text(encoding="utf-8"),
    )
    assert said == [(total, caught, without)]
