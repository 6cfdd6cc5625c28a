"""A process that knows torch and transformers and no numerics_suite, and runs scripts one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = """
import contextlib, io, json, runpy, sys, traceback
sys.modules["numerics_suite"] = None  # an import of it raises ImportError, though it is installed here
import torch, transformers
usual = sys.path[:]
for line in sys.stdin:
    said, status = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(line.rstrip("\\n"), run_name="__main__")
        except BaseException:
            traceback.print_exc()
            status = 1
    # As in a process that has just begun.
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    sys.path[:] = usual
    print(json.dumps([status, said.getvalue()]), flush=True)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a script ended."""

    status: int
    said: str

    @property
    def reproduced(self) -> bool:
        """It failed by its own assertion."""
        return self.status == 1 and "AssertionError: REPRODUCED: " in self.said

    @property
    def not_reproduced(self) -> bool:
        """It ended well and says so."""
        return self.status == 0 and "\nnot reproduced: " in f"\n{self.said}"


class ScriptProcess:
    """Importing torch and transformers takes seconds, so it is done once for all scripts; each has names of its own."""

    def __init__(self, process: Any, folder: Path) -> None:
        self.process, self.folder, self.count = process, folder, 0

    def run(self, text: str) -> Ran:
        """Run the text as a script in a file of its own."""
        self.count += 1
        path = self.folder / f"script-{self.count}.py"
        path.write_text(text, encoding="utf-8")
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the process that runs the scripts is gone"
        status, said = json.loads(answer)
        return Ran(status=status, said=said)


def surroundings(folder: Path) -> dict[str, str]:
    """The environment of a script: nothing leads to this package, and a checkpoint's code is kept in the folder."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "HF_MODULES_CACHE": str(folder / "modules")}


@contextmanager
def script_process(folder: Path) -> Iterator[ScriptProcess]:
    """The process, started and ended; scripts and the code of checkpoints are kept in the folder."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-W", "ignore", "-c", SERVER],
        env=surroundings(folder),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield ScriptProcess(process, folder)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)
        assert process.stdout is not None
        process.stdout.close()
