"""Runs `numerics-suite check` on a device and on the CPU, and compares the answers."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preloaded import python

TESTS = Path(__file__).resolve().parents[1]
STANDIN = TESTS / "standin"
"""On PYTHONPATH of a process, and of all that it starts, this folder gives torch the stand-in accelerator."""

DEVICE = "standin"
Key = tuple[str, str, str, str]
"""Check, subject, precision and attention: what a question is on any device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a command ended.

    Attributes:
        status: exit status.
        results: the results file; empty where none was written.
        said: standard error.
    """

    status: int
    results: dict[str, Any]
    said: str

    def statuses(self) -> dict[Key, str]:
        """The status of every question."""
        return {
            (check["check"], check["subject"], check["precision"], check["attn"]): check["status"]
            for check in self.results["checks"]
        }

    def wrong(self) -> list[str]:
        """One line for each answer that is a finding or an error."""
        return [
            f"{check['id']}: {check['status']} {check['reason'] or check['finding']['title']}"
            for check in self.results["checks"]
            if check["status"] in {"failed", "error"}
        ]


def environment(**variables: str) -> dict[str, str]:
    """The variables of a process that has the stand-in.

    Args:
        variables: more of them, such as the stand-in's own switches.
    """
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(STANDIN), str(TESTS.parent), str(TESTS), *([before] if before else [])])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}


def check(folder: Path, *arguments: str, **variables: str) -> Ended:
    """Run `numerics-suite check` in a process of its own that has the stand-in.

    Args:
        folder: where it runs and writes.
        arguments: of the command, the device among them.
        variables: of its environment.
    """
    out = folder / "results.json"
    out.unlink(missing_ok=True)
    command = [python(str(STANDIN)), "-m", "numerics_suite", "check", *arguments, "--json", str(out), "--quiet"]
    done = subprocess.run(
        command, cwd=folder, env=environment(**variables), capture_output=True, text=True, check=False
    )
    results = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    return Ended(status=done.returncode, results=results, said=done.stderr)
