"""A hub id becomes a folder through `huggingface_hub`'s cache."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from numerics_suite.core.errors import BadInputError

_ID = re.compile(r"(?P<id>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?")
_FILES = ["*.json", "*.safetensors", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jinja"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HubId:
    """`org/name@revision`.

    Attributes:
        id: `org/name`.
        revision: as typed, None where it was not.
    """

    id: str
    revision: str | None


def parse_hub_id(source: str) -> HubId | None:
    """The hub id that `source` is, None where it has another form."""
    match = _ID.fullmatch(source)
    return HubId(id=match["id"], revision=match["revision"]) if match else None


def snapshot(hub_id: HubId, *, allow_pickle: bool) -> Path:
    """The folder of one revision's files; its name is the commit.

    With a network, missing files are downloaded; offline (`HF_HUB_OFFLINE=1`) only the cache is used.

    Raises:
        BadInputError: it is unavailable; the message says what was tried.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline = bool(constants.HF_HUB_OFFLINE)
    try:
        folder = snapshot_download(
            hub_id.id,
            revision=hub_id.revision,
            local_files_only=offline,
            allow_patterns=[*_FILES, "*.bin"] if allow_pickle else _FILES,
        )
        return Path(folder)
    except LocalEntryNotFoundError:
        kept = _kept(hub_id, Path(constants.HF_HUB_CACHE))
        if kept is not None:
            return kept
        way = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        message = f"{_text(hub_id)} is not a directory and not in the hub's cache {constants.HF_HUB_CACHE} ({way})"
    except (HfHubHTTPError, ValueError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = f"{_text(hub_id)} cannot be downloaded from the hub: {lines[0] if lines else type(error).__name__}"
    raise BadInputError(message)


def _text(hub_id: HubId) -> str:
    return f"{hub_id.id}@{hub_id.revision}" if hub_id.revision else hub_id.id


def _kept(hub_id: HubId, cache: Path) -> Path | None:
    """The snapshot of a commit given by a part of its name, or the only snapshot of a repository without refs."""
    folders = cache / f"models--{hub_id.id.replace('/', '--')}" / "snapshots"
    if not folders.is_dir():
        return None
    prefix = hub_id.revision or ""
    found = [folder for folder in sorted(folders.iterdir()) if folder.is_dir() and folder.name.startswith(prefix)]
    return found[0] if len(found) == 1 else None
