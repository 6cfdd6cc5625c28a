"""Whether another release of transformers is advice that the evidence supports."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from packaging.version import Version

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.diagnosis.consequences import NO_RUN
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.subjects import compat
from numerics_suite.subjects.fixtures import fixture_names, fixture_path
from numerics_suite.subjects.resolve import resolve_all
from numerics_suite.subjects.validate import needs_remote_code, read_config

if TYPE_CHECKING:
    from torch import nn

    from numerics_suite.core.records import Finding
    from numerics_suite.diagnosis.remedy_trials import Ask

NEWER, PIN = "newer-version", "pin-version"

NEWEST_READ = Version("5.24.0")
"""The newest release that this tool was held against (docs/versions.md). Whether there is a newer one, only an index can say."""

RELEASED_CODE = frozenset({"transformers", "peft"})
"""Packages whose classes change with the release that is installed."""

ITS_PARTS = RELEASED_CODE | {"torch", "accelerate", "numerics_suite"}
"""Packages whose modules and wrappers a model of such a class has inside, and those of this tool."""


NO_SHAPE = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "id2label",
        "label2id",
        "problem_type",
        "use_cache",
    }
)
"""Keys that say nothing of what is computed."""


def borne_out(finding: Finding, context: CellContext) -> Finding:
    """The finding without advice on versions that the evidence speaks against.

    No release of transformers changes the user's own code, and none gives back the weights that a baseline was recorded of.
    """
    out = {NEWER, PIN} if is_users_code(context) else set()
    baseline, digest = context.request.baseline, context.subject.digest
    if baseline is not None and digest is not None and baseline.subject.get("digest") != digest:
        out.add(PIN)
    return _without(finding, out)


def without_newer(finding: Finding) -> Finding:
    """The finding without `newer-version` where the newest release is installed, as far as is known without asking an index."""
    return _without(finding, {NEWER} if Version(compat.version()) >= NEWEST_READ else set())


def _without(finding: Finding, names: set[str]) -> Finding:
    remedies = tuple(one for one in finding.remedies if one.name not in names or one.verified is not None)
    return replace(finding, remedies=remedies)


def clean_on_a_fixture(check: str, context: CellContext, ask: Ask) -> bool:
    """Whether the installed release passes the check on a shipped checkpoint of the same shape: then the release is not at fault.

    The shape is what config.json says apart from sizes and names: architecture, rotary section, biases, tied embeddings.
    """
    subject = context.subject
    if subject.kind not in {"directory", "hub"} or subject.adapter_base or subject.quantized:
        return False
    shape = _shape(subject.config)
    alike = (name for name in fixture_names() if _shape(read_config(fixture_path(name))) == shape)
    for name in alike:
        try:
            (fixture,) = resolve_all((f"fixture:{name}",), task=subject.task)
            cell = replace(context.cell, subject=fixture.id)
            sound = CellContext(fixture, cell, replace(context.request, data=None, baseline=None))
            return not ask(check, sound).breaches
        except (NumericsSuiteError, *NO_RUN):
            continue
    return False


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return value if isinstance(value, (str, bool)) else None

    return {key: plain(value) for key, value in config.items() if key not in NO_SHAPE and plain(value) is not None}


def without_pin(finding: Finding) -> Finding:
    """The finding without `pin-version`."""
    return _without(finding, {PIN})


def borne_out_of(finding: Finding, model: nn.Module) -> Finding:
    """The same for a model that was watched, of which there is neither a folder nor a baseline."""
    return without_newer(_without(finding, {NEWER, PIN} if _is_users_class(model) else set()))


def is_users_code(context: CellContext) -> bool:
    """Whether the model's class is the user's: of a factory's module, or of the code in a checkpoint's folder."""
    if context.subject.kind == "fixture":
        return False  # its code ships with this tool
    try:
        return _is_users_class(context.model) or (context.subject.kind == "factory" and _is_changed(context.model))
    except NumericsSuiteError:  # it cannot be loaded
        return context.subject.kind == "factory" or needs_remote_code(context.subject.config)


def _is_changed(model: nn.Module) -> bool:
    """Whether code of the user's own runs inside: a module of another class, or one whose class or instance was given another forward."""
    return any(not _is_released(type(module)) or _root(module.forward) not in ITS_PARTS for module in model.modules())


def _is_released(kind: type) -> bool:
    """Whether a package that is a part of every such model has this class; one made of it as it runs stands in no module."""
    held = getattr(sys.modules.get(kind.__module__), kind.__name__, None)
    return _root(kind) in ITS_PARTS and held is kind


def _root(named: object) -> str:
    return str(getattr(named, "__module__", None)).partition(".")[0]


def _is_users_class(model: nn.Module) -> bool:
    return type(model).__module__.partition(".")[0] not in RELEASED_CODE
