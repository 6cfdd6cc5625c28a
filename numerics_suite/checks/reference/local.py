"""reference.local."""

from __future__ import annotations

from collections.abc import Iterable

from numerics_suite.core.errors import NotApplicableError
from numerics_suite.core.records import Measurement
from numerics_suite.core.registry import check
from numerics_suite.observing.local_error import LocalError, local_errors
from numerics_suite.running.evidence import Evidence
from numerics_suite.running.forward import dtype_of
from numerics_suite.running.twins import is_reference_itself, rounding_allowance, without_labels
from numerics_suite.subjects.families.family import Family


def role_of(class_name: str, family: Family) -> str:
    """The role whose budget judges a module class: the family's kinds, torch's own layers, else `other`."""
    kind = family.kind_of(class_name)
    if kind is not None:
        return kind
    return {"Linear": "linear", "Embedding": "embedding"}.get(class_name, "other")


@check(needs=("token-ids",))
def local(evidence: Evidence) -> Iterable[Measurement]:
    """Does every module, fed what it really got, err by no more than its right program does?

    Root mean square error against its own true fp64 output, in unit roundoffs of what it computes in; by role.
    """
    if is_reference_itself(evidence):
        reason = "fp64 is the reference itself"
        raise NotApplicableError(reason)
    autocast = dtype_of(evidence.recipe.autocast) if evidence.recipe.autocast else None
    found = local_errors(evidence.model, without_labels(evidence.training_batch.tensors), autocast=autocast)
    judged = [error for error in found if not error.left_out and error.dtype != "float64"]
    if not judged:
        reason = "no module could be lifted to float64"
        raise NotApplicableError(reason)
    for role in dict.fromkeys(role_of(error.class_name, evidence.family) for error in judged):
        members = [error for error in judged if role_of(error.class_name, evidence.family) == role]
        worst = max(members, key=_rank)
        wide = worst.dtype == "float32"
        allowance = rounding_allowance(evidence) if evidence.recipe.computes_in == "float32" else 1.0
        yield Measurement(
            name=f"{role}-fp32" if wide else role,
            value=worst.rms_roundoffs / (allowance if wide else 1.0),
            unit="roundoffs",
            module=worst.module,
            facts={"class": worst.class_name, "computes in": worst.dtype, "largest error": worst.max_roundoffs},
        )


def _rank(error: LocalError) -> float:
    return float("inf") if error.rms_roundoffs != error.rms_roundoffs else error.rms_roundoffs
