"""The finding of one check on one cell, with its reproducer and without remedies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mutants.driver import MutantSession

from numerics_suite.core.errors import BadInputError, NotApplicableError, UnsupportedError
from numerics_suite.core.records import Batch, Finding
from numerics_suite.core.registry import get_check
from numerics_suite.diagnosis.findings import finding
from numerics_suite.diagnosis.reproducer import reproducer
from numerics_suite.engine.cell_context import CellContext
from numerics_suite.settings.tree import Settings
from numerics_suite.suite.driver import ask


class UnseenError(Exception):
    """The check did not fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a check found, where, and the script of it."""

    finding: Finding
    context: CellContext
    batch: Batch | None
    script: str | None


def shown(
    source: object,
    check: str,
    *,
    measurement: str = "",
    precision: str = "fp32",
    attn: str = "eager",
    **changes: Any,
) -> Shown:
    """Ask the check as the command would, of a subject in which it must fail.

    Args:
        source: SUBJECT.
        check: its id.
        measurement: the breach that the finding is written of; the worst one unless given.
        precision: of the cell.
        attn: of the cell.
        changes: other settings.

    Raises:
        UnseenError: the check does not fail there.
    """
    settings = Settings(
        subjects=(str(source),),
        precision=(precision,),
        attn=(attn,),
        checks=(check,),
        trust_remote_code=True,
        device="cpu",
        origins={"precision": "command line"},
        **changes,
    )
    session = MutantSession(settings)
    try:
        (question,) = session.plan.questions
    except BadInputError as error:
        raise UnseenError(str(error)) from error
    if question.skip is not None:
        raise UnseenError(question.skip)
    context = session.context(question.cell)
    try:
        outcome = ask(get_check(check), context, seed=settings.seed, max_examples=settings.max_examples)
    except (NotApplicableError, UnsupportedError) as error:
        raise UnseenError(str(error)) from error
    breaches = [item for item in outcome.breaches if measurement in {"", item.measurement.name}]
    if not breaches:
        message = f"{check} passes: {outcome.worst}"
        raise UnseenError(message)
    found = finding(breaches, context, outcome.batch)
    return Shown(
        finding=found,
        context=context,
        batch=outcome.batch,
        script=reproducer(check, found, context, outcome.batch),
    )
