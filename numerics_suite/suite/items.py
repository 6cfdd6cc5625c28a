"""The items that pytest runs: one per question of the plan, and what its answer means to pytest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from numerics_suite.core.registry import GROUPS
from numerics_suite.core.text import harmless
from numerics_suite.suite.stash import result_key, session_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numerics_suite.core.records import Cell
    from numerics_suite.suite.planning import Question
    from numerics_suite.suite.session import SuiteSession

OTHERS = "extensions"
"""Of `test_extensions.py`, where the checks of other packages are asked, whatever their groups are."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The fixture of every item of the suite: one question, and the session that answers it."""

    question: Question
    session: SuiteSession
    item: pytest.Item

    def ask(self) -> None:
        """Answer the question and turn the answer into pytest's outcome."""
        result, trace = self.session.answer(self.question)
        self.item.stash[result_key] = result
        if result.status == "skipped":
            pytest.skip(_shown(result.reason or ""))
        if result.status == "failed":
            from numerics_suite.reports.text import finding_text

            pytest.fail(finding_text(result, diagnosed=self.session.settings.diagnose), pytrace=False)
        if result.status == "error":
            pytest.fail(_shown(f"{result.id}: error: {result.reason}\n{trace}"), pytrace=False)


def _shown(text: str) -> str:
    """The text for pytest's terminal: a model's exceptions are shown, and steer neither a terminal nor GitHub's runner."""
    return "\n".join(harmless(line) for line in text.splitlines())


@pytest.fixture
def numerics_question(request: pytest.FixtureRequest) -> Asked:
    """The question of this item."""
    return Asked(request.param, request.config.stash[session_key], request.node)


def parametrize_questions(metafunc: pytest.Metafunc, questions: Sequence[Question]) -> None:
    """One parameter per question of the file's group; the checks of other packages share one file."""
    group, plugins = metafunc.function.__name__.removeprefix("test_"), metafunc.config.pluginmanager
    parameters = []
    for question in questions:
        if group != (question.group if question.group in GROUPS else OTHERS):
            continue
        marks = marks_of(question.cell, metafunc.config)
        if plugins.hasplugin("rerunfailures"):
            marks.append(pytest.mark.flaky(reruns=0))  # an answer that changes when it is asked again is no pass
        parameters.append(pytest.param(question, id=question.param_id, marks=marks))
    metafunc.parametrize("numerics_question", parameters, indirect=True)


def marks_of(cell: Cell, config: pytest.Config) -> list[pytest.MarkDecorator]:
    """Of every item of a cell: with xdist all go to one worker, and those that need an accelerator are `gpu`."""
    marks = [pytest.mark.xdist_group(cell.param_id)] if config.pluginmanager.hasplugin("xdist") else []
    return marks if cell.device.startswith("cpu") else [*marks, pytest.mark.gpu]


def question_of(item: pytest.Item) -> Question | None:
    """The question of an item of the suite, None of any other test."""
    from numerics_suite.suite.planning import Question

    callspec = getattr(item, "callspec", None)
    value = callspec.params.get("numerics_question") if callspec is not None else None
    return value if isinstance(value, Question) else None
