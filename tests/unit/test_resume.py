"""`--resume FILE`: which answers of an earlier run are taken over, and what is refused by name."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from numerics_suite.cli.main import main
from numerics_suite.core import answer_file

MODEL = """
import torch
from torch import nn
from helper_here import WIDTH

def sound():
    open("calls", "a").write("x")
    return nn.Linear(WIDTH, WIDTH), {"input": torch.ones(2, WIDTH)}

def broken():
    module = nn.Linear(WIDTH, WIDTH)
    module.weight.data[0, 0] = float("nan")
    return module, {"input": torch.ones(2, WIDTH)}
"""
CHECKS = ("--checks", "load.finite,load.dtype,forward.finite", "--no-diagnose", "--quiet", "-n", "0")
Check = Callable[..., int]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "made_here.py").write_text(MODEL, encoding="utf-8")
    (tmp_path / "helper_here.py").write_text("WIDTH = 4\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("made_here", "helper_here"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def check(*arguments: str, factory: str = "sound") -> int:
    for name in ("made_here", "helper_here"):
        sys.modules.pop(name, None)  # each run is a process of its own elsewhere
    return main(["check", f"factory:made_here:{factory}", *CHECKS, "--precision", "fp32,bf16", *arguments])


def read(name: str = "out.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path(name).read_text(encoding="utf-8"))
    return content


def shortened(keep: int, **changes: Any) -> None:
    """Leave a file as a run that was killed leaves it."""
    content = read()
    content |= {"complete": False, "verdict": "error", "exit_status": 3, "checks": content["checks"][:keep], **changes}
    Path("out.json").write_text(json.dumps(content), encoding="utf-8")


def entries(document: dict[str, Any]) -> dict[str, Any]:
    return {
        entry["id"]: {key: value for key, value in entry.items() if key != "duration_s"} for entry in document["checks"]
    }


@pytest.mark.parametrize("factory", ["sound", "broken"])
def test_the_rest_is_asked_and_the_whole_is_what_one_run_gives(folder: Path, factory: str) -> None:
    status = check("--json", "out.json", factory=factory)
    whole = read()
    assert status == (0 if factory == "sound" else 1)
    marked = [{**entry, "duration_s": 12345.0} for entry in whole["checks"]]
    Path("out.json").write_text(json.dumps({**whole, "checks": marked}), encoding="utf-8")
    shortened(3)
    assert check("--json", "out.json", "--resume", "out.json", factory=factory) == status
    again = read()
    assert entries(again) == entries(whole)
    assert sum(entry["duration_s"] == 12345.0 for entry in again["checks"]) == 3
    assert any("3 of 6 answers are those of out.json" in note for note in again["notes"])
    assert again["complete"]


def test_what_a_time_limit_left_out_and_what_failed_for_want_of_an_answer_is_asked(folder: Path) -> None:
    assert check("--json", "out.json", "--max-time", "0.000001") == 5
    left_out = read()
    assert {entry["reason"] for entry in left_out["checks"]} == {"time limit"}
    assert left_out["notes"] == ["--max-time: 6 checks were not begun"]
    assert check("--json", "out.json", "--resume", "out.json") == 0
    assert {entry["status"] for entry in read()["checks"]} == {"passed"}
    edited(checks__1__duration_s=12345.0)
    edited(checks__0__status="error", checks__0__reason="the worker was killed")
    assert check("--json", "out.json", "--resume", "out.json", "--max-time", "900", "--allow-partial") == 0
    assert any("5 of 6 answers" in note for note in read()["notes"])
    assert read()["checks"][1]["duration_s"] == 12345.0
    assert check("--json", "out.json") == 0
    assert read()["checks"][1]["duration_s"] != 12345.0, "without --resume nothing is reused"


def edited(**changes: Any) -> None:
    content = read()
    for path, value in changes.items():
        part: Any = content
        *folders, name = path.split("__")
        for each in folders:
            part = part[int(each)] if isinstance(part, list) else part[each]
        part[name] = value
    Path("out.json").write_text(json.dumps(content), encoding="utf-8")


DIFFERENCES: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (("--seed", "1"), {}, "setting seed is 0 there and 1 here"),
    (("--steps", "2"), {}, "setting steps is 5 there and 2 here"),
    (("--skip", "load.dtype"), {}, "setting skip is empty there and load.dtype here"),
    (("--name", "other"), {}, "subjects are sound there and other here"),
    ((), {"tool__version": "0.0.9"}, "tool version is 0.0.9 there and"),
    ((), {"environment__packages__torch": "2.0.0"}, "package torch is 2.0.0 there and"),
    ((), {"environment__python": "3.9.1"}, "python is 3.9.1 there and"),
    ((), {"environment__digests__numerics-suite": "sha256:00"}, "code or data of numerics-suite is sha256:00"),
    ((), {"subjects__0__digest": "sha256:00"}, "subject sound: digest is sha256:00"),
    ((), {"checks__0__id": "load.tied/sound/fp32/default/cpu"}, "load.tied/sound/fp32/default/cpu is not asked here"),
]


def test_each_difference_is_refused_by_name_and_the_file_stays(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check("--json", "out.json") == 0
    original = Path("out.json").read_text(encoding="utf-8")
    for arguments, changes, said in DIFFERENCES:
        Path("out.json").write_text(original, encoding="utf-8")
        edited(**changes)
        before = Path("out.json").read_bytes()
        assert check("--json", "out.json", "--resume", "out.json", *arguments) == 4
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1, err
        assert Path("out.json").read_bytes() == before
    Path("out.json").write_text(original, encoding="utf-8")
    (folder / "helper_here.py").write_text("WIDTH = 5\n", encoding="utf-8")
    assert check("--json", "out.json", "--resume", "out.json") == 4
    assert "code or data of factory:made_here:sound is sha256:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read other.json"),
        ("[1, 2", "not JSON"),
        ('{"command": "matrix", "cells": []}', "--resume other.json: not a results file of check"),
        ('{"command": "check", "schema_version": 99}', "schema_version 99"),
    ],
)
def test_what_is_no_results_file_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str | None, said: str
) -> None:
    if content is not None:
        Path("other.json").write_text(content, encoding="utf-8")
    for target in ("out.json", "other.json"):
        assert check("--json", target, "--resume", "other.json") == 4
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not Path("out.json").exists()
    assert (Path("other.json").read_text(encoding="utf-8") if content is not None else None) == content


def test_a_run_that_was_killed_before_its_plan_has_nothing_to_reuse(folder: Path) -> None:
    from numerics_suite.reports.results import dump, unfinished

    Path("out.json").write_text(dump(unfinished("check", checks=[])), encoding="utf-8")
    assert check("--json", "out.json", "--resume", "out.json") == 0
    assert any("0 of 6 answers" in note for note in read()["notes"])


def test_a_disk_that_is_full_hides_no_verdict_and_keeps_the_answers(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from numerics_suite.core import atomic

    real, written = atomic._replace, []

    def full(target: Path, content: bytes) -> None:
        if any(b'"check": "load.finite"' in earlier for earlier in written):
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(content)
        real(target, content)

    monkeypatch.setattr(answer_file, "INTERVAL", 0.0)
    monkeypatch.setattr(atomic, "_replace", full)
    assert check("--json", "out.json", factory="broken") == 4
    told = capsys.readouterr()
    assert told.err == "numerics-suite: error: --json: cannot write out.json: No space left on device\n"
    assert "FAIL: " in told.out
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    left = read()
    assert (left["complete"], left["verdict"]) == (False, "error")
    assert left["checks"]
    assert check("--json", "out.json", "--resume", "out.json", factory="broken") == 1
    assert any(f"{len(left['checks'])} of 6 answers" in note for note in read()["notes"])
