"""The workflow of a host of repositories: which host, where its file goes, and the text made for this repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from numerics_suite import __version__

Host = Literal["github", "gitlab"]
HOSTS: tuple[Host, ...] = ("github", "gitlab")

GITHUB = Path(".github/workflows/numerics.yml")
GITLAB = Path(".gitlab-ci.yml")
GITLAB_INCLUDED = Path(".gitlab/numerics.yml")
"""Where a repository has a `.gitlab-ci.yml` of its own, which is the user's and stays as it is."""


def host_of(folder: Path) -> Host:
    """The host that a repository seems to live at; GitHub where nothing tells."""
    if (folder / ".github").is_dir():
        return "github"
    if (folder / GITLAB).exists() or (folder / ".gitlab").is_dir():
        return "gitlab"
    try:
        remotes = (folder / ".git" / "config").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "github"
    return "gitlab" if re.search(r"^\s*url\s*=.*gitlab", remotes, re.MULTILINE) else "github"


def place_of(folder: Path, host: Host) -> Path:
    """Where the workflow goes."""
    if host == "github":
        return GITHUB
    return GITLAB_INCLUDED if (folder / GITLAB).exists() else GITLAB


def meaning_of(path: Path) -> str:
    """What the file is for, and what the user must do for it to be used."""
    if path == GITLAB_INCLUDED:
        return f"the gate; add to {GITLAB}: include: {{local: /{path.as_posix()}}}"
    return "the gate in CI"


def text_of(folder: Path, host: Host) -> str:
    """The workflow, with the lines that install this repository's own packages."""
    template = (Path(__file__).resolve().parent / "templates" / f"{host}.yml").read_text(encoding="utf-8")
    # The user's own pins of transformers and torch are what an upgrade changes, so they are installed first.
    return template.replace("@INSTALL@", f"{_own(folder)}numerics-suite=={__version__}")


def _own(folder: Path) -> str:
    parts = []
    if (folder / "requirements.txt").is_file():
        parts.append("-r requirements.txt ")
    pyproject = folder / "pyproject.toml"
    if pyproject.is_file() and re.search(r"^\[project\]", pyproject.read_text(encoding="utf-8"), re.MULTILINE):
        parts.append(". ")
    return "".join(parts)
