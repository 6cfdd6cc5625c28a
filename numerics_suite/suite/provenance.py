"""What the answers of a run rest on besides its subjects' files: the settings as used, and digests of code and data."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numerics_suite.core.extensions import GROUPS, extensions
from numerics_suite.settings.tree import to_json
from numerics_suite.subjects.factory import PREFIX
from numerics_suite.subjects.files import sha256_of, tree_digest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numerics_suite.settings.tree import Settings
    from numerics_suite.suite.planning import SuitePlan

PACKAGE = Path(__file__).resolve().parents[1]
INSTALLED = {"site-packages", "dist-packages"}


def settings_as_used(settings: Settings, plan: SuitePlan) -> dict[str, Any]:
    """Every option, with what `auto` and the device's default became."""
    used = {"device": plan.device, "precision": list(dict.fromkeys(cell.precision for cell in plan.cells))}
    return {**to_json(settings), **used}


def input_digests(settings: Settings, plan: SuitePlan) -> dict[str, str]:
    """`sha256:…` of what a version does not tell: code that may have been edited where it lies, data and baselines.

    The plan has called the factories, so the modules that they import are loaded.
    """
    found = {"numerics-suite": tree_digest(PACKAGE, PACKAGE.rglob("*.py"))}
    types = {
        str(subject.config["model_type"]) for subject in plan.subjects.values() if subject.config.get("model_type")
    }
    if types:
        found["transformers"] = _of_transformers(types)
    for subject in plan.subjects.values():
        if subject.kind == "factory":
            found[subject.source] = _of_factory(subject.source.removeprefix(PREFIX).partition(":")[0])
    for group in GROUPS:
        for extension in extensions(group).values():
            found[extension.distribution] = _of_package(extension.entry.value.partition(":")[0].partition(".")[0])
    if settings.data is not None:
        found["--data"] = sha256_of(settings.data)
    if plan.baselines is not None:
        folder = Path(plan.baselines.folder)
        found["baselines"] = tree_digest(folder, (file for file in folder.rglob("*") if file.is_file()))
    return {name: f"sha256:{digest}" for name, digest in found.items() if digest}


def _of_transformers(types: Iterable[str]) -> str:
    """Of the files that every model runs through, and those of these model types."""
    import transformers
    from transformers.models.auto.configuration_auto import model_type_to_module_name

    root = Path(transformers.__file__).resolve().parent
    folders = [root, root / "integrations", *(root / "models" / model_type_to_module_name(name) for name in types)]
    return tree_digest(root, (file for folder in folders for file in folder.glob("*.py")))


def _of_factory(module: str) -> str:
    """Of the module's package, or of its file and what it has imported from the folder that the file lies in."""
    top = module.partition(".")[0]
    spec = _spec(top)
    if spec is None or spec.submodule_search_locations or spec.origin is None:
        return _of_package(top)
    own = Path(spec.origin).resolve()
    files = {own}
    for loaded in list(sys.modules.values()):
        origin = getattr(loaded, "__file__", None)
        file = Path(origin).resolve() if origin else own
        if file.is_relative_to(own.parent) and not INSTALLED & set(file.parts) and not file.is_relative_to(PACKAGE):
            files.add(file)
    return tree_digest(own.parent, (file for file in files if file.is_file()))


def _of_package(name: str) -> str:
    """Of all Python files of an importable package or module; empty where there is none."""
    spec = _spec(name)
    if spec is None:
        return ""
    for location in spec.submodule_search_locations or ():
        return tree_digest(Path(location), Path(location).rglob("*.py"))
    return sha256_of(Path(spec.origin)) if spec.origin and Path(spec.origin).is_file() else ""


def _spec(name: str) -> ModuleSpec | None:
    """Where a module comes from; None for one that comes from no file, such as `__main__` or one made by hand."""
    try:
        return importlib.util.find_spec(name)
    except ValueError:  # a loaded module without a spec
        return None


def named_differences(there: Mapping[str, Any], here: Mapping[str, Any], what: str = "") -> list[str]:
    """`seed is 1 there and 0 here` for each name whose value differs."""
    lines = []
    for name in sorted({*there, *here}):
        before, now = there.get(name), here.get(name)
        if before != now:
            label = f"{what} {name}".strip()
            lines.append(f"{label} is {_shown(before)} there and {_shown(now)} here")
    return lines


def _shown(value: Any) -> str:
    if value is None:
        return "absent"
    if isinstance(value, list):
        return ",".join(str(item) for item in value)[:60] or "empty"
    text = str(value)
    return f"{text[:15]}…" if text.startswith("sha256:") else text[:60]
