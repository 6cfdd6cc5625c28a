"""The API for packages that add checks, families, remedies or reporters.

These names are stable; no other name inside the package is. Each name is imported on first use. Old names
still work and give a DeprecationWarning. docs/extending.md shows how to use them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numerics_suite.core.atomic import write_atomic
    from numerics_suite.core.errors import BadInputError, NotApplicableError
    from numerics_suite.core.records import (
        Batch,
        Budget,
        Cell,
        CheckResult,
        Finding,
        Measurement,
        RunResult,
        Series,
        Subject,
    )
    from numerics_suite.core.registry import AddedCheck, CheckSpec, check
    from numerics_suite.definitions.config import OracleUnavailable, read_rope
    from numerics_suite.definitions.definition import Context, Head, Oracle
    from numerics_suite.definitions.parts import ModuleScope, activation, attend, frequencies, rotate
    from numerics_suite.diagnosis.remedies import Attempt
    from numerics_suite.diagnosis.remedy_register import AddedRemedy
    from numerics_suite.engine.cell_context import CellContext
    from numerics_suite.engine.references import plain_answer, rounded_answer, true_answer
    from numerics_suite.reports.documents import CheckRun, Documents
    from numerics_suite.subjects.families.family import AddedFamily, Family
    from numerics_suite.subjects.load import Loaded

_HOMES = {
    "numerics_suite.core.atomic": ("write_atomic",),
    "numerics_suite.core.errors": ("BadInputError", "NotApplicableError"),
    "numerics_suite.core.records": (
        "Batch",
        "Budget",
        "Cell",
        "CheckResult",
        "Finding",
        "Measurement",
        "RunResult",
        "Series",
        "Subject",
    ),
    "numerics_suite.core.registry": ("AddedCheck", "CheckSpec", "check"),
    "numerics_suite.diagnosis.remedy_register": ("AddedRemedy",),
    "numerics_suite.diagnosis.remedies": ("Attempt",),
    "numerics_suite.definitions.config": ("OracleUnavailable", "read_rope"),
    "numerics_suite.definitions.definition": ("Context", "Head", "Oracle"),
    "numerics_suite.definitions.parts": ("ModuleScope", "activation", "attend", "frequencies", "rotate"),
    "numerics_suite.reports.documents": ("CheckRun", "Documents"),
    "numerics_suite.engine.cell_context": ("CellContext",),
    "numerics_suite.engine.references": ("plain_answer", "rounded_answer", "true_answer"),
    "numerics_suite.subjects.families.family": ("AddedFamily", "Family"),
    "numerics_suite.subjects.load": ("Loaded",),
}
"""Module of each name."""

_RENAMED = {"Evidence": "CellContext", "Place": "ModuleScope", "Run": "CheckRun"}
"""Old name → new name. Arguments and attributes with old names are marked where they are defined, with `renamed`."""

__all__ = [
    "AddedCheck",
    "AddedFamily",
    "AddedRemedy",
    "Attempt",
    "BadInputError",
    "Batch",
    "Budget",
    "Cell",
    "CellContext",
    "CheckResult",
    "CheckRun",
    "CheckSpec",
    "Context",
    "Documents",
    "Family",
    "Finding",
    "Head",
    "Loaded",
    "Measurement",
    "ModuleScope",
    "NotApplicableError",
    "Oracle",
    "OracleUnavailable",
    "RunResult",
    "Series",
    "Subject",
    "activation",
    "attend",
    "check",
    "frequencies",
    "plain_answer",
    "read_rope",
    "rotate",
    "rounded_answer",
    "true_answer",
    "write_atomic",
]


def __getattr__(name: str) -> Any:
    """Import the name on first use."""
    import importlib

    if name in _RENAMED:
        from numerics_suite.core.deprecation import warn_renamed

        warn_renamed(name, _RENAMED[name], frames=1)
        name = _RENAMED[name]
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
