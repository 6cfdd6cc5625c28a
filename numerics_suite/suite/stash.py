"""What a pytest run keeps of the suite in its config, under keys that the plugin and `check` share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from numerics_suite.core.records import CheckResult
    from numerics_suite.suite.collector import Gate
    from numerics_suite.suite.run import RunContext
    from numerics_suite.suite.session import SuiteSession

run_key: pytest.StashKey[RunContext] = pytest.StashKey()
"""The command that drives the run; absent under plain pytest and in workers."""
session_key: pytest.StashKey[SuiteSession] = pytest.StashKey()
user_session_key: pytest.StashKey[SuiteSession] = pytest.StashKey()
"""For `numerics_subject` in tests of the user, where the suite does not run too."""
gate_key: pytest.StashKey[Gate] = pytest.StashKey()
result_key: pytest.StashKey[CheckResult] = pytest.StashKey()
WORKER_SESSION = "numerics_session"
"""Of xdist's `workerinput`: the session, pickled."""
