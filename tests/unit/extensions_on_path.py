"""Extensions as an installer leaves them: a folder for the path, with the metadata in which importlib finds entry points."""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "tests" / "extension"
SOURCES = EXAMPLE / "src"


def write_extension(
    site: Path, entries: dict[str, dict[str, str]], name: str = "acme-numerics", version: str = "1.0.0"
) -> Path:
    """Metadata of a package with these entry points, by group and name."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
    (folder / "entry_points.txt").write_text(entry_points_text(entries), encoding="utf-8")
    return site


def entry_points_text(entries: dict[str, dict[str, str]]) -> str:
    sections = (
        f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in named.items())
        for group, named in entries.items()
    )
    return "\n".join(sections)


def example_project() -> dict:
    return tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def install_example(site: Path) -> list[str]:
    """What stands on the path once the example is installed; nothing is built and nothing is fetched."""
    project = example_project()
    write_extension(site, project["entry-points"], project["name"], project["version"])
    return [str(site), str(SOURCES)]
