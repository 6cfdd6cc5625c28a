"""What is published: the wheel holds everything that the tool reads, the sdist builds the same wheel, and both work outside the tree."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from email.parser import Parser
from pathlib import Path

import pytest
from uv import find_uv_bin

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="not run from the source tree"),
    pytest.mark.xdist_group("packaging"),
]


def build(source: Path, folder: Path, what: str) -> Path:
    """One distribution, built without a network: hatchling is one of the tests' own packages."""
    command = [find_uv_bin(), "build", f"--{what}", "--no-build-isolation", "--offline", "--python", sys.executable]
    done = subprocess.run(
        [*command, "--out-dir", str(folder), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = (path for path in folder.iterdir() if path.suffix in {".whl", ".gz"})
    return built


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("sdist"), "sdist")


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the wheel's files as an installer lays them out."""
    folder = tmp_path_factory.mktemp("site")
    command = [find_uv_bin(), "pip", "install", "--offline", "--no-deps", "--python", sys.executable]
    done = subprocess.run([*command, "--target", str(folder), str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(installed: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs Python with the installed wheel in front of this tree."""

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return call


def files_of(wheel: Path) -> dict[str, bytes]:
    """Path to content, without the record and the tags, in which times and tools may stand."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith(("/RECORD", "/WHEEL"))}


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    held = set(files_of(wheel))
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "numerics_suite", "fixtures"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    # Without git (an unpacked sdist) the tree holds nothing but what was packed.
    names = [name for name in listed if (ROOT / name).is_file()] or [
        path.relative_to(ROOT).as_posix()
        for top in ("numerics_suite", "fixtures")
        for path in (ROOT / top).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert len(names) > 200
    wanted = {
        name.replace("fixtures/", "numerics_suite/_fixtures/", 1) if name.startswith("fixtures/") else name
        for name in names
    }
    assert not wanted - held


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    top = {name.split("/")[0] for name in files_of(wheel)}
    assert len(top) == 2
    assert "numerics_suite" in top
    assert not [name for name in files_of(wheel) if name.endswith((".pyc", ".so"))]


def test_the_metadata_says_what_an_installer_and_a_lawyer_need(wheel: Path) -> None:
    files = files_of(wheel)
    (folder,) = {name.split("/")[0] for name in files if name.split("/")[0].endswith(".dist-info")}
    metadata = Parser().parsestr(files[f"{folder}/METADATA"].decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    for name in metadata.get_all("License-File") or []:
        assert f"{folder}/licenses/{name}" in files
    assert f"{folder}/licenses/LICENSE" in files
    assert "numerics-suite = numerics_suite.cli.main:entry" in files[f"{folder}/entry_points.txt"].decode()
    assert "numerics_suite/py.typed" in files


def test_what_others_wrote_comes_with_its_licence(wheel: Path) -> None:
    files = files_of(wheel)
    scripts = [name for name in files if name.endswith((".min.js", ".umd.js"))]
    for name in scripts:
        folder = name.rpartition("/")[0]
        licences = [other for other in files if other.startswith(f"{folder}/") and "LICENSE" in other.upper()]
        assert licences, f"{name} has no licence file beside it"


def test_the_sdist_builds_the_same_wheel(wheel: Path, sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (tree,) = (tmp_path / "unpacked").iterdir()
    again = build(tree, tmp_path / "again", "wheel")
    assert files_of(again) == files_of(wheel)
    assert {path.name for path in (ROOT / "benchmarks").glob("*.py")} <= {
        path.name for path in (tree / "benchmarks").iterdir()
    }


def test_the_installed_wheel_works_outside_the_tree(
    run: Callable[..., subprocess.CompletedProcess[str]], installed: Path
) -> None:
    where = run("-c", "import numerics_suite; print(numerics_suite.__file__)")
    assert Path(where.stdout.strip()).is_relative_to(installed)
    version = run("-m", "numerics_suite", "--version")
    assert version.stdout.startswith("numerics-suite "), version.stderr
    listed = run("-m", "numerics_suite", "fixtures", "list")
    assert "glm4-tiny" in listed.stdout, listed.stderr


def test_the_installed_wheel_checks_its_own_fixture(run: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    command = ("check", "fixture:glm4-tiny", "--precision", "bf16", "--attn", "sdpa", "--checks", "load.*", "-n", "0")
    done = run("-m", "numerics_suite", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS (exit 0)" in done.stdout


TYPED = """\
import numerics_suite
reveal_type(numerics_suite.watch)
numerics_suite.watch(every="two")
"""


@pytest.mark.slow
def test_a_users_type_checker_sees_our_types(installed: Path, tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(TYPED, encoding="utf-8")
    # Their types are not asked about here, and reading torch's takes a minute.
    skipped = "".join(
        f"[mypy-{name}.*]\nfollow_imports = skip\n" for name in ("torch", "transformers", "hypothesis", "pytest")
    )
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nignore_missing_imports = true\nfollow_imports = silent\n{skipped}")
    # mypy does not read py.typed on MYPYPATH; only what is installed counts, so the folder is named as site-packages are.
    code = (
        "import sys; from mypy import modulefinder, api;"
        f"found = modulefinder.get_search_dirs; modulefinder.get_search_dirs = lambda p: ([], [{str(installed)!r}, *found(p)[1]]);"
        "out, err, _ = api.run(['user.py']); print(out, err)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    ).stdout
    assert "Revealed type is" in said
    assert 'Revealed type is "Any"' not in said
    assert "error: " in said, said
