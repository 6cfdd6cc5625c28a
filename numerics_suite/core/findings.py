"""A finding in JSON, as CONTRACT.md writes it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from numerics_suite.core.numbers import jsonable
from numerics_suite.core.records import Finding
from numerics_suite.core.typed_records import record_of


def finding_to_json(finding: Finding) -> dict[str, Any]:
    """A FINDING of the contract."""
    content: dict[str, Any] = jsonable(asdict(finding))
    for remedy in content["remedies"]:
        remedy["with"] = remedy.pop("together")
    return content


def finding_from_json(content: Mapping[str, Any], where: str = "") -> Finding:
    """The inverse of :func:`finding_to_json`; a TypeError names the field that is wrong, after `where`."""
    return record_of(Finding, content, where)
