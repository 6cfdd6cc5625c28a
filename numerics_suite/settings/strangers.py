"""What a pyproject.toml that came with a checkpoint may not decide: whoever made the checkpoint may have written it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.text import harmless

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numerics_suite.settings.accept import AcceptEntry

CHECKPOINT = ("config.json", "adapter_config.json")
WITHHELD = ("trust_remote_code", "allow_pickle", "allow_partial", "allow_no_gpu", "checks", "skip")
"""Fields of `Settings` that run code of the checkpoint or hide what is wrong with it."""

FACTORY = "factory:"
_said: set[Path] = set()


def without_strangers_wishes(
    file: Path, stated: Mapping[str, Any], accept: tuple[AcceptEntry, ...], subjects: Iterable[str]
) -> tuple[dict[str, Any], tuple[AcceptEntry, ...]]:
    """The settings of a file, without those that it may not set where it lies with a checkpoint; one line says so."""
    left = dict(stated)
    if not lies_with_checkpoint(file, [*subjects, *left.get("subjects", ())]):
        return left, accept
    ignored = [name.replace("_", "-") for name in WITHHELD if left.pop(name, None)]
    kept = tuple(subject for subject in left.get("subjects", ()) if not subject.startswith(FACTORY))
    if kept != left.get("subjects", ()):
        ignored.append("factory: subjects")
        left["subjects"] = kept
        left.pop("names", None)  # which belong to subjects by their place
        if not kept:
            left.pop("subjects")
    if "report" in left and not left["report"].resolve().is_relative_to(file.parent.resolve()):
        ignored.append("report")  # it would overwrite files elsewhere
        left.pop("report")
    if accept:
        ignored.append("accept")
    if ignored and file not in _said:
        _said.add(file)
        text = f"numerics-suite: {harmless(str(file))} lies in a checkpoint's folder; ignored there: {', '.join(ignored)}\n"
        with contextlib.suppress(OSError):
            sys.stderr.write(text)
    return left, ()


def lies_with_checkpoint(file: Path, subjects: Iterable[str]) -> bool:
    """Whether a file lies in or below the folder of a subject, or in a folder that itself holds a checkpoint."""
    folder = file.parent.resolve()
    if any((folder / name).exists() for name in CHECKPOINT):
        return True
    for subject in subjects:
        place = Path(subject).expanduser()
        if place.is_dir() and folder.is_relative_to(place.resolve()):
            return True
    return False
