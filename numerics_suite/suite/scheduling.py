"""Which worker runs which cell: all questions of a cell go to one worker, so that its model is loaded once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xdist.scheduler import LoadGroupScheduling

if TYPE_CHECKING:
    import pytest
    from xdist.workermanage import WorkerController

    from numerics_suite.suite.planning import Question, SuitePlan


class CellScheduling(LoadGroupScheduling):  # type: ignore[misc]  # xdist has no types
    """xdist's groups, taken from the plan.

    xdist writes the group of a test into its node id, which pytest 9.1 and later ignore; then every test would be a group
    of its own. It also waits for ever after a worker was replaced: it hands the groups that are done to the new one, or
    one last test, which a worker begins only once it knows the next test or that there is none.
    """

    def __init__(self, config: pytest.Config, log: Any, plan: SuitePlan) -> None:
        """Learn which parameter id belongs to which cell."""
        super().__init__(config, log)
        self._questions = {question.param_id: question for question in plan.questions}

    def _split_scope(self, nodeid: str) -> str:
        question = self._question(nodeid)
        group: str = question.cell.id if question is not None else super()._split_scope(nodeid)
        return group

    def _question(self, nodeid: str) -> Question | None:
        return self._questions.get(nodeid.rpartition("[")[2].partition("]")[0])

    def remove_node(self, node: WorkerController) -> str | None:
        """Take a worker out; what it had not finished waits for another one.

        Returns:
            Id of the test that it was at, None if it had finished.
        """
        crashed: str | None = super().remove_node(node)
        for group in [group for group, tests in self.workqueue.items() if all(tests.values())]:
            del self.workqueue[group]
        return crashed

    def give_up(self, nodeid: str) -> Question | None:
        """Run nothing more of the cell that a worker died in, which another worker might not survive either.

        Returns:
            What it was asked, None for a test that is not the suite's.
        """
        self.workqueue.pop(self._split_scope(nodeid), None)
        return self._question(nodeid)

    def _reschedule(self, node: WorkerController) -> None:
        super()._reschedule(node)
        while self.workqueue and not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            self._assign_work_unit(node)
        if not self.workqueue and not node.shutting_down:
            node.shutdown()  # after what it holds
