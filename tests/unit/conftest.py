"""What several files of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from unit.script_process import ScriptProcess, script_process


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptProcess]:
    """Runs scripts without this package."""
    with script_process(tmp_path_factory.mktemp("scripts")) as process:
        yield process
