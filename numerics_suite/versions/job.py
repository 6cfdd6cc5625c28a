"""What one environment is asked to do, as a file that both sides read, and the key under which its answer is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from numerics_suite.core.versions import Versions
from numerics_suite.settings.accept import parse_accept
from numerics_suite.settings.table import BY_NAME
from numerics_suite.settings.tree import Settings, to_json
from numerics_suite.subjects.files import tree_digest
from numerics_suite.subjects.fixtures import fixture_names
from numerics_suite.versions.recipes import Wanted

JOB, RESULTS, BASELINE, DONE, LOG = "job.json", "results.json", "baseline", "done.json", "log.txt"
"""Files of a cell's folder. `done.json` is written last: without it nothing else in the folder counts."""

LAYOUT = 1
"""Raised when the files change their meaning, so that no older folder is reused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The task of one environment.

    Attributes:
        settings: of `check`, run in the environment's own process.
        versions: as planned; for the key and the log.
        cwd: the folder that the user's command ran in.
        check: run the suite.
        record: record baselines of the same cells.
        digests: of every file that the answer depends on, by what it is.
        threads: of each process.
        wanted: the environment, None for the running one; the process in it needs not know, so the file does not hold it.
    """

    settings: Settings
    versions: Versions
    cwd: str
    check: bool = True
    record: bool = True
    digests: Mapping[str, str]
    threads: int = 1
    wanted: Wanted | None = None

    def to_json(self) -> dict[str, Any]:
        """The job's file."""
        return {
            "layout": LAYOUT,
            "settings": to_json(self.settings),
            "versions": asdict(self.versions),
            "cwd": self.cwd,
            "check": self.check,
            "record": self.record,
            "digests": dict(self.digests),
            "threads": self.threads,
        }

    @property
    def name(self) -> str:
        """Name of the folder that keeps the answer: what a person looks for, and a hash of everything asked."""
        content = json.dumps(self.to_json(), sort_keys=True).encode()
        begin = "_".join(f"{name}-{version}" for name, version in self.versions.named.items()) or "current"
        return f"{begin}_{hashlib.sha256(content).hexdigest()[:16]}"


def read_job(path: Path) -> Job:
    """The job of a file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return Job(
        settings=settings_from_json(content["settings"]),
        versions=Versions(**{**content["versions"], "others": tuple(map(tuple, content["versions"]["others"]))}),
        cwd=content["cwd"],
        check=content["check"],
        record=content["record"],
        digests=content["digests"],
        threads=content["threads"],
    )


def settings_from_json(written: Mapping[str, Any]) -> Settings:
    """The inverse of :func:`numerics_suite.settings.tree.to_json`."""
    found: dict[str, Any] = {}
    for name in (item.name for item in fields(Settings)):
        if name not in written:
            continue
        value = written[name]
        if name == "accept":
            value = parse_accept(value, "accept")
        elif isinstance(value, list):
            value = tuple(value)
        elif value is not None and name in BY_NAME and BY_NAME[name].path:
            value = Path(value)
        found[name] = value
    return Settings(**found)


_DROPPED = ("workers", "json", "junitxml", "report", "quiet", "list_only")


def for_a_cell(settings: Settings) -> Settings:
    """The settings as a cell's own process uses them: absolute paths, no workers, no files but the cell's."""
    origins = {name: origin for name, origin in settings.origins.items() if name not in _DROPPED}
    return replace(
        settings,
        subjects=tuple(_absolute(source) for source in settings.subjects),
        data=settings.data.resolve() if settings.data else None,
        baseline=settings.baseline.resolve() if settings.baseline else None,
        workers=0,
        json=None,
        junitxml=None,
        report=None,
        quiet=False,
        list_only=False,
        origins=origins,
    )


def sources_of(settings: Settings) -> tuple[str, ...]:
    """SUBJECTs as given, else the shipped fixtures."""
    return settings.subjects or tuple(f"fixture:{name}" for name in fixture_names())


def _absolute(source: str) -> str:
    path = Path(source).expanduser()
    return str(path.resolve()) if path.is_dir() else source


@cache
def source_digest() -> str:
    """SHA-256 over this package's own files: another harness may judge otherwise, so nothing of it is reused."""
    root = Path(__file__).resolve().parents[1]
    ours = (path for path in root.rglob("*") if path.suffix in {".py", ".json", ".ini", ".j2"})
    return f"sha256:{tree_digest(root, (path for path in ours if not {'__pycache__', '_fixtures'} & set(path.parts)))}"
