"""What other packages add, loaded and validated before anything runs: one line reports a broken one."""

from __future__ import annotations

import string
from collections.abc import Collection, Iterator, Sequence
from typing import get_args

from numerics_suite.core.extensions import CHECKS, extensions
from numerics_suite.core.records import Budget
from numerics_suite.core.registry import GROUPS, AddedCheck, Scope, added_check
from numerics_suite.diagnosis.remedy_register import added_remedies, is_remedy
from numerics_suite.judgement.verdicts import is_cause
from numerics_suite.subjects.families import added_families

TITLE_FIELDS = frozenset({"value", "limit", "module", "parameters", "step", "facts"})
"""What a budget's title may have filled in."""


def load_extensions(checks: Sequence[str], needs: Collection[str]) -> None:
    """Load whatever of other packages a run may come to need.

    Raises:
        BadInputError: something of it cannot be used; the message says whose it is.
    """
    added_families()
    added_remedies()
    ours = extensions(CHECKS, taken=GROUPS)
    for check in checks:
        added = added_check(check)
        if added is not None:
            for why in _mistakes(added, needs):
                ours[check].refuse(why)


def _mistakes(added: AddedCheck, needs: Collection[str]) -> Iterator[str]:
    """What is wrong with a check, first of all what the suite would silently ignore."""
    spec = added.spec
    if spec.scope not in get_args(Scope):
        yield f"scope '{spec.scope}' is none of {', '.join(get_args(Scope))}"
    for need in sorted(spec.needs - set(needs)):
        yield f"needs '{need}', which is none of {', '.join(needs)}"
    if not added.budgets:
        yield "it has no budget, so nothing of it can fail"
    judged = [budget.measurement for budget in added.budgets]
    if len(set(judged)) < len(judged):
        yield "two budgets judge the same measurement"
    for budget in added.budgets:
        yield from (f"budget of '{budget.measurement}': {why}" for why in _mistakes_of_budget(budget, spec.id))


def _mistakes_of_budget(budget: Budget, check: str) -> Iterator[str]:
    if budget.check != check:
        yield f"it is of the check '{budget.check}', and must be of '{check}'"
    if not budget.limit >= 0:
        yield f"the limit {budget.limit} is below 0 or no number"
    if not is_cause(budget.cause, check):
        prefix = check.partition(".")[0]
        yield f"the cause '{budget.cause}' is none of numerics-suite's and does not begin with '{prefix}.'"
    for name in budget.remedies:
        if not is_remedy(name):
            yield f"the remedy '{name}' is neither numerics-suite's nor an entry of numerics_suite.remedies"
    try:
        fields = {field.partition("[")[0] for _, field, _, _ in string.Formatter().parse(budget.title) if field}
    except ValueError as error:
        yield f"the title '{budget.title}': {error}"
        return
    for field in sorted(fields - TITLE_FIELDS):
        yield f"the title holds {{{field}}}, which is none of {', '.join(sorted(TITLE_FIELDS))}"
