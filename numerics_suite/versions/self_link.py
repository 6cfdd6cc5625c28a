"""How does an environment get numerics-suite? By a folder that holds a link to the running package and nothing else.

Installing would test another copy, and putting the running environment's site-packages on the path would bring its
transformers along.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import numerics_suite
from numerics_suite.core.atomic import write_atomic
from numerics_suite.subjects.files import tree_digest
from numerics_suite.subjects.fixtures import cache_dir, fixtures_root

PACKAGE = "numerics_suite"
FIXTURES = "_fixtures"

_ENTRY_POINTS = f"[pytest11]\n{PACKAGE} = {PACKAGE}.plugin\n"


def package_folder() -> Path:
    """The running package."""
    return Path(numerics_suite.__file__).resolve().parent


def sites_folder() -> Path:
    """Where the folders with links are."""
    return cache_dir() / "running-copies"


def running_copy() -> Path:
    """A folder for PYTHONPATH: the running package by link, and metadata that names its version and pytest plugin.

    Where links are impossible (Windows without the right to make them) the package is copied, anew when it changed.
    """
    package = package_folder()
    folder = sites_folder() / hashlib.sha256(f"{package}\0{numerics_suite.__version__}".encode()).hexdigest()[:16]
    link = folder / PACKAGE
    if link.is_symlink() and link.resolve() == package and _metadata(folder).is_dir():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _write_metadata(folder)
    if not _link(link, package):
        return _copied(folder, package)
    return folder


def _metadata(folder: Path) -> Path:
    return folder / f"{PACKAGE}-{numerics_suite.__version__}.dist-info"


def _write_metadata(folder: Path) -> None:
    metadata = _metadata(folder)
    metadata.mkdir(exist_ok=True)
    version = f"Metadata-Version: 2.1\nName: numerics-suite\nVersion: {numerics_suite.__version__}\n"
    write_atomic(metadata / "entry_points.txt", _ENTRY_POINTS)
    write_atomic(metadata / "METADATA", version)


def _link(link: Path, package: Path) -> bool:
    """Make the link in one step; processes that do it at once all succeed."""
    trial = link.with_name(f".{PACKAGE}-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        trial.symlink_to(package, target_is_directory=True)
    except OSError:
        return False
    try:
        trial.replace(link)
    except OSError:
        trial.unlink(missing_ok=True)
        return False
    return True


def _copied(folder: Path, package: Path) -> Path:
    """A copy under a name that says what is in it, so that one in use is never changed."""
    files = (path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    target = folder.with_name(f"{folder.name}-{tree_digest(package, files)[:16]}")
    if target.is_dir():
        return target
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(package, unfinished / PACKAGE, ignore=ignore)
        shutil.copytree(fixtures_root(), unfinished / PACKAGE / FIXTURES, ignore=ignore, dirs_exist_ok=True)
        _write_metadata(unfinished)
        unfinished.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target
