"""The line that is named is the model's, however this package was reached."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import numerics_suite

SCRIPT = """\
from numerics_suite.observations.module_trace import model_line

def own_function():
    from numerics_suite.observations.module_trace import ModuleStack
    stack = ModuleStack()
    stack.enter("layer")
    return stack.place(None).source  # place() asks from inside the package

print(model_line(), own_function())
"""


@pytest.mark.slow
def test_through_a_link_our_own_frames_are_still_ours(tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "numerics_suite").symlink_to(
        Path(numerics_suite.__file__).resolve().parent, target_is_directory=True
    )
    script = tmp_path / "model_code.py"
    script.write_text(SCRIPT, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "linked")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["model_code.py:9", "model_code.py:7"], done.stdout + done.stderr
