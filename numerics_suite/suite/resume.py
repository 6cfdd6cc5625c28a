"""`--resume FILE`: the answers of an earlier run, where nothing that can change one of them differs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numerics_suite import __version__
from numerics_suite.core.errors import BadInputError
from numerics_suite.core.numbers import jsonable
from numerics_suite.engine.environment import describe_run
from numerics_suite.reports.documents import read_check
from numerics_suite.settings.tree import CHANGE_NO_ANSWER
from numerics_suite.suite.endings import UNASKED
from numerics_suite.suite.provenance import input_digests, named_differences, settings_as_used

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numerics_suite.settings.tree import Settings
    from numerics_suite.suite.planning import SuitePlan

SUBJECT_FACTS = ("digest", "revision", "family", "model_class", "task")
MOST_TOLD = 6
"""Differences that one line names; a file of another release and another machine may have dozens."""


def earlier_answers(path: Path, settings: Settings, plan: SuitePlan) -> dict[str, Mapping[str, Any]]:
    """Entries of `checks` that answer a question of this plan, by id.

    What has no answer is asked again: checks that a time limit left out, and errors, which say that no answer came.

    Raises:
        BadInputError: it is no results file of `check`, or something that can change an answer differs; the message names it.
    """
    content, run = read_check(path, "--resume")
    if not run.checks:
        return {}  # ended before its first answer, perhaps before it had a plan
    differing = _differences(content, settings, plan)
    if differing:
        told = "; ".join(differing[:MOST_TOLD])
        more = f"; and {len(differing) - MOST_TOLD} more" if len(differing) > MOST_TOLD else ""
        message = f"--resume {path}: its answers are not those of this run: {told}{more}"
        raise BadInputError(message)
    answered = {
        result.id
        for result in run.checks
        if result.status != "error" and not (result.status == "skipped" and result.reason in UNASKED)
    }
    return {entry["id"]: entry for entry in content["checks"] if entry["id"] in answered}


def _differences(content: Mapping[str, Any], settings: Settings, plan: SuitePlan) -> list[str]:
    """What differs between the run of a results file and this one, by name."""
    environment = jsonable({**describe_run(plan.device), "digests": input_digests(settings, plan)})
    there = content["environment"]
    tool = content.get("tool", {})
    found = named_differences({"tool version": tool.get("version")}, {"tool version": __version__})
    found += _subjects(content["subjects"], plan)
    # Subjects are compared by what SUBJECT and --name stand for: `./model` and its absolute path are the same.
    left_out = CHANGE_NO_ANSWER | {"subjects", "names"}
    used = jsonable(settings_as_used(settings, plan))
    found += named_differences(
        {name: value for name, value in content["settings"].items() if name not in left_out},
        {name: value for name, value in used.items() if name not in left_out},
        "setting",
    )
    found += named_differences({"python": there["python"]}, {"python": environment["python"]})
    for kind, what in (("packages", "package"), ("extensions", "extension"), ("digests", "code or data of")):
        found += named_differences(there.get(kind) or {}, environment[kind], what)
    if not found:
        asked = {question.id for question in plan.questions}
        found = [f"{entry['id']} is not asked here" for entry in content["checks"] if entry["id"] not in asked]
    return found


def _subjects(there: list[Mapping[str, Any]], plan: SuitePlan) -> list[str]:
    before = {subject["id"]: subject for subject in there}
    if set(before) != set(plan.subjects):
        return [f"subjects are {', '.join(sorted(before))} there and {', '.join(sorted(plan.subjects))} here"]
    found: list[str] = []
    for name, subject in plan.subjects.items():
        earlier = {fact: before[name].get(fact) for fact in SUBJECT_FACTS}
        found += named_differences(
            earlier, {fact: getattr(subject, fact) for fact in SUBJECT_FACTS}, f"subject {name}:"
        )
    return found
