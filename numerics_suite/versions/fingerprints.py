"""What the parent process knows of the subjects without torch: that they are there, their digests, names and sizes."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from numerics_suite.core.errors import BadInputError
from numerics_suite.subjects.files import digest, joint_digest, safetensors_files, tree_digest
from numerics_suite.subjects.fixtures import fixture_digest, fixture_path
from numerics_suite.subjects.hub import parse_hub_id, snapshot
from numerics_suite.versions.job import source_digest, sources_of

if TYPE_CHECKING:
    from numerics_suite.settings.tree import Settings

FIXTURE, FACTORY, ADAPTER = "fixture:", "factory:", "adapter_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownSubject:
    """A subject, before any environment is made.

    Attributes:
        source: as typed.
        name: as it will be called.
        digest: changes whenever its files do.
        weight_bytes: of its files.
    """

    source: str
    name: str
    digest: str
    weight_bytes: int = 0


def know(source: str, name: str | None = None, *, allow_pickle: bool = False) -> KnownSubject:
    """See that a subject is there.

    Raises:
        BadInputError: it is not.
    """
    if source.startswith(FACTORY):
        return KnownSubject(source=source, name=name or source.rpartition(":")[2], digest=_factory_digest(source))
    if source.startswith(FIXTURE):
        path = fixture_path(source.removeprefix(FIXTURE))
        return KnownSubject(source=source, name=name or source.removeprefix(FIXTURE), digest=fixture_digest(path))
    path = Path(source).expanduser()
    hub_id = None if path.is_dir() else parse_hub_id(source)
    if hub_id is not None and not source.startswith((".", "/", "~")):
        folder = snapshot(hub_id, allow_pickle=allow_pickle)
        return KnownSubject(source=source, name=name or hub_id.id, digest=digest(folder), weight_bytes=_size(folder))
    _refuse(source, path)
    path = path.resolve()
    return KnownSubject(source=source, name=name or path.name, digest=_digest(path), weight_bytes=_size(path))


def _refuse(source: str, path: Path) -> None:
    if path.is_dir() and ((path / "config.json").is_file() or (path / ADAPTER).is_file()):
        return
    if path.is_dir():
        message = f"{path} has no config.json; name the folder that holds it"
    else:
        what = "a file, not a directory" if path.exists() else "no such directory"
        message = (
            f"{source}: {what}; SUBJECT is a directory, org/name[@revision], fixture:NAME or factory:module:function"
        )
    raise BadInputError(message)


def know_all(settings: Settings) -> tuple[KnownSubject, ...]:
    """Every subject of the settings.

    Raises:
        BadInputError: one is not there, or two have one name.
    """
    sources = sources_of(settings)
    names: Sequence[str | None] = [*settings.names, *[None] * (len(sources) - len(settings.names))]
    found = tuple(
        know(source, name, allow_pickle=settings.allow_pickle) for source, name in zip(sources, names, strict=True)
    )
    seen: dict[str, str] = {}
    for known in found:
        if known.name in seen:
            message = (
                f"'{seen[known.name]}' and '{known.source}' are both named '{known.name}': tell them apart with --name"
            )
            raise BadInputError(message)
        seen[known.name] = known.source
    if settings.data is not None and not settings.data.is_file():
        message = f"--data: {settings.data} cannot be read: no such file"
        raise BadInputError(message)
    return found


def digests(settings: Settings, known: Sequence[KnownSubject], baseline: Path | None) -> Mapping[str, str]:
    """Digests of everything that an answer depends on besides settings and versions."""
    found = {"numerics-suite": source_digest(), **{one.name: one.digest for one in known}}
    for name, path in (("--data", settings.data), ("--baseline", baseline)):
        if path is not None and path.exists():
            found[name] = _tree_digest(path)
    return found


def _tree_digest(path: Path) -> str:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    return f"sha256:{tree_digest(path, files)}"


def _digest(path: Path) -> str:
    """Of a folder; of an adapter with its base where that is a folder too."""
    adapter = path / ADAPTER
    if not adapter.is_file() or (path / "config.json").is_file():
        return digest(path)
    from numerics_suite.subjects.adapters import base_folder
    from numerics_suite.subjects.files import read_json

    return joint_digest((digest(path), digest(base_folder(path, read_json(adapter), allow_pickle=False))))


def _size(path: Path) -> int:
    files = safetensors_files(path) or path.glob("*.bin")
    return sum(file.stat().st_size for file in files)


def _factory_digest(source: str) -> str:
    """Of the module's file in the working directory; of a module elsewhere nothing is known, so no answer is reused."""
    module = source.removeprefix(FACTORY).partition(":")[0]
    path = Path(*module.split(".")).with_suffix(".py")
    if module and path.is_file():
        return _tree_digest(path)
    return f"unknown:{uuid.uuid4()}"
