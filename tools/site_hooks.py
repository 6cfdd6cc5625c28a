"""What mkdocs asks of us before it builds the site: one folder with docs/, the files outside it and the generated pages.

The folder is made anew at every build and no part of the repository. Files at the repository's root are read where they
are, so that GitHub and the site show the same text; links are turned to where each file stands in the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

import reference

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
ASSEMBLED = ROOT / "build" / "docs"

OUTSIDE = {
    "README.md": "index.md",
    "README.zh.md": "index.zh.md",
    "ARCHITECTURE.md": "project/architecture.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CHANGELOG.md": "project/changelog.md",
    "LICENSE": "project/LICENSE",
    "action.yml": "examples/action.yml",
    **{f"numerics_suite/reports/{name}": f"reference/{name}" for name in reference.SCHEMAS.values()},
}
"""Files of the repository outside docs/ that are part of the site, and where they stand in it."""

LANGUAGES = re.compile(r"\[[^\]]+\]\(README(\.zh)?\.md\) · ")
"""README's link to itself in the other language, for which the site has a switch."""

LINK = re.compile(r"(?<=\]\()(?P<path>[^)#:\s]+)(?=[)#])")
"""The target of an inline link to a file, without its anchor."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Assemble the sources and build from there."""
    assemble(ASSEMBLED)
    config.watch = [*dict.fromkeys([*config.watch, str(DOCS), *(str(ROOT / source) for source in OUTSIDE)])]
    config.docs_dir = str(ASSEMBLED)
    return config


def assemble(folder: Path) -> None:
    """Write the sources of the site.

    Args:
        folder: what else it holds is removed; a file that is the same is not touched, so `mkdocs serve` rests.
    """
    wanted = sources()
    for path, content in wanted.items():
        place = folder / path
        if not place.is_file() or place.read_bytes() != content:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    for place in folder.rglob("*"):
        if place.is_file() and place.relative_to(folder).as_posix() not in wanted:
            place.unlink()


def sources() -> Mapping[str, bytes]:
    """Every file of the site by its path in it."""
    files = {path.relative_to(ROOT).as_posix(): path for path in DOCS.rglob("*") if path.is_file()}
    files |= {source: ROOT / source for source in OUTSIDE}
    found = {}
    for source, path in files.items():
        content = path.read_bytes()
        found[in_site(source)] = relinked(content.decode(), source).encode() if path.suffix == ".md" else content
    return found | {path: text.encode() for path, text in reference.pages().items()}


def relinked(markdown: str, source: str) -> str:
    """The text with each link between files of the repository as a link between files of the site.

    Args:
        markdown: of the file.
        source: its path in the repository.
    """
    here = posixpath.dirname(in_site(source))

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match["path"]))
        place = in_site(target).replace(".zh.md", ".md")  # which language it is in is the site's affair
        return posixpath.relpath(place, here or ".")

    return LINK.sub(moved, LANGUAGES.sub("", markdown))


def in_site(path: str) -> str:
    """Where a file of the repository stands in the site.

    Args:
        path: from the repository's root.
    """
    if (ROOT / path).is_dir():
        path += "/README.md"  # what GitHub shows of a folder
    return OUTSIDE.get(path, path.removeprefix("docs/"))
