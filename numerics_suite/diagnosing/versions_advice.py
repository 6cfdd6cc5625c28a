"""Whether another release of transformers is advice that the evidence bears out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from packaging.version import Version

from numerics_suite.core.errors import NumericsSuiteError
from numerics_suite.subjects import compat
from numerics_suite.subjects.validate import needs_remote_code

if TYPE_CHECKING:
    from torch import nn

    from numerics_suite.core.records import Finding
    from numerics_suite.engine.evidence import Evidence

NEWER, PIN = "newer-version", "pin-version"

NEWEST_READ = Version("5.24.0")
"""The newest release that this tool was held against (docs/versions.md). Whether there is a newer one, only an index can say."""

RELEASED_CODE = frozenset({"transformers", "peft"})
"""Packages whose classes change with the release that is installed."""


def borne_out(finding: Finding, evidence: Evidence) -> Finding:
    """The finding without advice on versions that the evidence speaks against.

    No release of transformers changes the user's own code, and none gives back the weights that a baseline was recorded of.

    Args:
        finding: with remedies that were not tried yet.
        evidence: the cell, or the caught step.
    """
    out = {NEWER, PIN} if is_users_code(evidence) else set()
    baseline, digest = evidence.request.baseline, evidence.subject.digest
    if baseline is not None and digest is not None and baseline.subject.get("digest") != digest:
        out.add(PIN)
    return _without(finding, out)


def without_newer(finding: Finding) -> Finding:
    """The finding without `newer-version` where the newest release is installed, as far as is known without asking an index.

    Args:
        finding: of any check.
    """
    return _without(finding, {NEWER} if Version(compat.version()) >= NEWEST_READ else set())


def _without(finding: Finding, names: set[str]) -> Finding:
    remedies = tuple(one for one in finding.remedies if one.name not in names or one.verified is not None)
    return replace(finding, remedies=remedies)


def borne_out_of(finding: Finding, model: nn.Module) -> Finding:
    """The same for a model that was watched, of which there is neither a folder nor a baseline.

    Args:
        finding: with remedies that were not tried yet.
        model: the plain one.
    """
    return without_newer(_without(finding, {NEWER, PIN} if _is_users_class(model) else set()))


def is_users_code(evidence: Evidence) -> bool:
    """Whether the model's class is the user's: of a factory's module, or of the code in a checkpoint's folder.

    Args:
        evidence: the cell, or the caught step.
    """
    if evidence.subject.kind == "fixture":
        return False  # its code ships with this tool
    try:
        return _is_users_class(evidence.model)
    except NumericsSuiteError:  # it cannot be loaded
        return evidence.subject.kind == "factory" or needs_remote_code(evidence.subject.config)


def _is_users_class(model: nn.Module) -> bool:
    return type(model).__module__.partition(".")[0] not in RELEASED_CODE
