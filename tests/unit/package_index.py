"""Tiny wheels written by hand, in a folder or behind an index made of files, so that pip and uv are run for real and offline."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from importlib.metadata import version as installed
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

from numerics_suite.versions.recipes import OPTIONAL, own_requirements

RUNNING_TORCH = Version(installed("torch")).public
RUNNING_TRANSFORMERS = Version(installed("transformers")).public


def write_wheel(folder: Path, name: str, version: str, code: str = "", requires: tuple[str, ...] = ()) -> Path:
    """A wheel with one module that holds its version."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    files = {
        f"{module}/__init__.py": f"__version__ = {version!r}\n{code}\n",
        f"{info}/METADATA": metadata + "".join(f"Requires-Dist: {line}\n" for line in requires),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},{_digest(content)},{len(content)}\n" for path, content in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n"
    path = folder / f"{module}-{version}-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
    return path


def _digest(content: str) -> str:
    raw = hashlib.sha256(content.encode()).digest()
    return f"sha256={base64.urlsafe_b64encode(raw).rstrip(b'=').decode()}"


def write_index(root: Path, package: str, wheels: list[Path], yanked: tuple[str, ...] = ()) -> str:
    """An index of files with the package's page; its address."""
    page = root / package
    page.mkdir(parents=True, exist_ok=True)
    lines = []
    for wheel in wheels:
        mark = ' data-yanked="broken"' if any(f"-{version}-" in wheel.name for version in yanked) else ""
        lines.append(f'<a href="{wheel.as_uri()}"{mark}>{wheel.name}</a><br>')
    (page / "index.html").write_text(f"<!DOCTYPE html><html><body>{''.join(lines)}</body></html>", encoding="utf-8")
    return root.as_uri()


def write_everything(folder: Path, *transformers: str) -> Path:
    """What an environment needs, as wheels without content, and these releases of transformers."""
    write_wheel(folder, "torch", f"{RUNNING_TORCH}+cpu")
    for version in (RUNNING_TRANSFORMERS, *transformers):
        write_wheel(folder, "transformers", version, requires=("rich",))
    names = {canonicalize_name(requirement.name) for requirement in own_requirements()} - {"torch", "transformers"}
    for name in sorted(names | set(OPTIONAL)):
        write_wheel(folder, name, "99.0")
    return folder


def only_from(monkeypatch, folder: Path, cache: Path) -> None:
    """pip and uv see these wheels and nothing else; every cache is the test's own."""
    import os

    for name in list(os.environ):
        if name.startswith(("PIP_", "UV_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(cache / "uv"))
    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(cache / "suite"))
