"""Which file a finding's `modeling_glm4.py:123` is: the user's own, in the repository, or one of an installed package.

No path of this machine comes out: a file of the repository is named from its root, a package's from site-packages.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from numerics_suite.reports.documents import Documents

PACKAGES = ("transformers", "peft", "accelerate")
"""Whose modules run between torch and the user; looked through, not imported."""

OPTIMIZERS = ("torch", "optim")
"""The one folder of torch whose lines a finding names."""

MOST_FILES = 50_000
"""Files of a repository that are looked at; in a larger one none is named."""

_LEFT_OUT = frozenset({"node_modules", "site-packages", "__pycache__", "build", "dist"})
_SOURCE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*\.py):([1-9][0-9]{0,8})")


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceLine:
    """A line of a file.

    Attributes:
        path: with `/`, from the root of the repository or from site-packages.
        line: from 1.
        root: whose path it is.
    """

    path: str
    line: int
    root: Literal["repository", "site-packages"]


class Sources:
    """Finds the files that findings name."""

    def __init__(self, documents: Documents, root: Path | None = None) -> None:
        """Look at nothing yet.

        Args:
            documents: whose subjects' folders are looked in first: a checkpoint may bring its code.
            root: of the repository; None for the folder of `.git` at or above the current one, else the current one.
        """
        self.root = (root or repository()).resolve()
        self._folders = list(_subject_folders(documents, self.root))
        self._own: dict[str, list[str]] | None = None

    def find(self, source: str | None) -> SourceLine | None:
        """The file and the line, None where it is not known or where several files have the name.

        Args:
            source: `file.py:123`.
        """
        found = _SOURCE.fullmatch(source or "")
        if found is None:
            return None
        name, line = found[1], int(found[2])
        beside = [folder / name for folder in self._folders if (folder / name).is_file()]
        if beside:
            return SourceLine(path=beside[0].relative_to(self.root).as_posix(), line=line, root="repository")
        packaged = in_packages(name)
        if packaged:
            return SourceLine(path=packaged[0], line=line, root="site-packages") if len(packaged) == 1 else None
        if self._own is None:
            self._own = _python_files(self.root, named_from=self.root)
        own = self._own.get(name, [])
        return SourceLine(path=own[0], line=line, root="repository") if len(own) == 1 else None


def repository() -> Path:
    """The folder of `.git` at or above the current folder, else the current folder."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".git").exists()), here)


def _subject_folders(documents: Documents, root: Path) -> Iterator[Path]:
    """Folders of checkpoints that lie in the repository."""
    sources = dict.fromkeys(subject.source for run in documents.every_run for subject in run.result.subjects)
    for source in sources:
        try:
            folder = Path(source).resolve()
            inside = folder.is_dir() and folder.is_relative_to(root)
        except (OSError, ValueError):  # a name that no file system takes
            continue
        if inside:
            yield folder


@cache
def in_packages(name: str) -> tuple[str, ...]:
    """Paths of the installed files of that name, from site-packages."""
    return tuple(path for package in (*PACKAGES, "torch") for path in _files_of(package).get(name, ()))


@cache
def _files_of(package: str) -> dict[str, list[str]]:
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    if not places:
        return {}
    top = Path(places[0])
    return _python_files(top.joinpath(*OPTIMIZERS[1:]) if package == OPTIMIZERS[0] else top, named_from=top.parent)


def _python_files(top: Path, named_from: Path) -> dict[str, list[str]]:
    """Paths by name, in an order that does not depend on the file system; no hidden folder and no environment."""
    found: dict[str, list[str]] = {}
    seen = 0
    for folder, folders, files in os.walk(top):
        here = Path(folder)
        seen += len(files) + 1
        if seen > MOST_FILES:
            return {}
        folders[:] = sorted(name for name in folders if _is_source(here, name))
        for name in sorted(files):
            if name.endswith(".py"):
                found.setdefault(name, []).append((here / name).relative_to(named_from).as_posix())
    return found


def _is_source(parent: Path, name: str) -> bool:
    return not name.startswith(".") and name not in _LEFT_OUT and not (parent / name / "pyvenv.cfg").exists()
