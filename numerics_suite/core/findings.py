"""A finding in JSON, as CONTRACT.md writes it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from numerics_suite.core.numbers import jsonable, revived
from numerics_suite.core.records import Finding, Remedy


def finding_to_json(finding: Finding) -> dict[str, Any]:
    """A FINDING of the contract.

    Args:
        finding: of a check that did not pass.
    """
    return {
        "cause": finding.cause,
        "title": finding.title,
        "explanation": finding.explanation,
        "module": finding.module,
        "op": finding.op,
        "source": finding.source,
        "step": finding.step,
        "parameters": list(finding.parameters),
        "evidence": jsonable(finding.evidence),
        "batch": jsonable(finding.batch),
        "remedies": [_remedy_to_json(remedy) for remedy in finding.remedies],
        "reproducer": finding.reproducer,
        "consequence_of": finding.consequence_of,
    }


def finding_from_json(content: Mapping[str, Any]) -> Finding:
    """The inverse of :func:`finding_to_json`.

    Args:
        content: a FINDING.
    """
    return Finding(
        **{
            **content,
            "parameters": tuple(content["parameters"]),
            "evidence": revived(content["evidence"]),
            "batch": revived(content["batch"]),
            "remedies": tuple(_remedy_from_json(remedy) for remedy in content["remedies"]),
        }
    )


def _remedy_to_json(remedy: Remedy) -> dict[str, Any]:
    fields = asdict(remedy)
    together = fields.pop("together")
    return {**fields, "with": list(together)}


def _remedy_from_json(content: Mapping[str, Any]) -> Remedy:
    fields = dict(content)
    return Remedy(together=tuple(fields.pop("with", ())), **fields)
