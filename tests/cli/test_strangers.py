"""Files that somebody else wrote: what they hold is data, what they may set is little, and what they cost is bounded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from numerics_suite.cli.main import main
from numerics_suite.core.json_text import DEEPEST, parse_json, read_bytes
from numerics_suite.observations.finiteness import nan_count, nonfinite_count, not_finite
from numerics_suite.reports.lines import harmless
from numerics_suite.settings import strangers
from numerics_suite.settings.options import from_command_line

WISHES = """
[tool.numerics-suite]
trust-remote-code = true
allow-pickle = true
checks = ["load.finite"]
skip = ["train.*"]
subjects = ["factory:evil:main", "fixture:glm4-tiny"]
seed = 7
report = "../elsewhere"
[[tool.numerics-suite.accept]]
check = "load.finite"
reason = "trust me"
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(strangers, "_said", set())


def withheld(capsys: pytest.CaptureFixture[str], *subjects: str) -> bool:
    settings = from_command_line({"subjects": list(subjects)})
    said = capsys.readouterr().err
    assert settings.seed == 7
    none = not (
        settings.trust_remote_code or settings.allow_pickle or settings.checks or settings.skip or settings.accept
    )
    assert none == (said.count("\n") == 1)
    if none:
        assert "trust-remote-code" in said
        assert "accept" in said
        assert settings.report is None
        assert not any(subject.startswith("factory:") for subject in settings.subjects)
    return none


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json"])
def test_a_file_in_a_checkpoints_folder_sets_nothing_that_runs_code(tmp_path, capsys, name):
    (tmp_path / "pyproject.toml").write_text(WISHES)
    (tmp_path / name).write_text("{}")
    assert withheld(capsys)


def test_a_file_below_a_subjects_folder_neither(tmp_path, capsys, monkeypatch):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "pyproject.toml").write_text(WISHES)
    monkeypatch.chdir(tmp_path / "training")
    assert withheld(capsys, "..")


def test_a_file_below_a_folder_that_is_a_link_to_a_subject_neither(tmp_path, capsys, monkeypatch):
    (tmp_path / "real" / "inside").mkdir(parents=True)
    (tmp_path / "real" / "inside" / "pyproject.toml").write_text(WISHES)
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real" / "inside")
    assert withheld(capsys, str(tmp_path / "linked"))


def test_a_projects_own_file_is_heeded(tmp_path, capsys):
    (tmp_path / "pyproject.toml").write_text(WISHES)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text("{}")
    assert not withheld(capsys, "checkpoint")


def test_what_the_command_line_says_is_heeded_everywhere(tmp_path):
    (tmp_path / "pyproject.toml").write_text(WISHES)
    (tmp_path / "config.json").write_text("{}")
    assert from_command_line({"trust_remote_code": "true"}).trust_remote_code


def test_a_module_beside_a_checkpoint_is_never_imported(tmp_path):
    for name in ("rich", "json", "queue", "torch"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w').write(__name__)\nraise SystemExit(0)\n")
    command = [sys.executable, "-m", "numerics_suite", "check", "fixture:glm4-tiny", "--list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    ["[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000, "[1", "\ud800"],
)
def test_json_beyond_the_limits_is_refused(text):
    with pytest.raises(ValueError, match=r"more than|JSON|Expecting|surrogates"):
        parse_json(text)


def test_a_file_beyond_the_limit_is_refused(tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 11)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_bytes(tmp_path / "large", 10)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "generation_config.json"])
def test_a_deeply_nested_checkpoint_file_is_bad_input(tmp_path, capsys, name):
    from numerics_suite.subjects.fixtures import fixture_path

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in fixture_path("glm4-tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / name).write_text("[" * 100_000)
    status = main(["check", "checkpoint", "--list"])
    said = capsys.readouterr().err
    assert status == 4 or (status == 0 and name != "config.json"), said
    assert len(said.splitlines()) <= 1


@pytest.mark.parametrize(("field", "value"), [("hidden_size", -8), ("num_attention_heads", 0), ("vocab_size", -1)])
def test_a_size_that_no_model_has_is_bad_input(tmp_path, capsys, field, value):
    from numerics_suite.subjects.fixtures import fixture_path

    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in fixture_path("glm4-tiny").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, field: value}))
    assert main(["check", "checkpoint", "--list"]) == 4
    said = capsys.readouterr().err
    assert field in said
    assert len(said.splitlines()) == 1


def test_a_deeply_nested_results_file_is_bad_input(tmp_path, capsys):
    (tmp_path / "in.json").write_text('{"command": "check", "checks": ' + "[" * 100_000)
    assert main(["report", "in.json", "--out", "out"]) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "value"), [("status", "</td>**x** @all"), ("verdict", "![x](http://x)"), ("failures", [{"check": 1}])]
)
def test_a_matrix_files_words_are_words_of_ours(tmp_path, capsys, field, value):
    cell = {"transformers": "5.0.0", "torch": None, "python": None, "status": "passed", "verdict": "pass", field: value}
    (tmp_path / "in.json").write_text(json.dumps({"schema_version": 1, "command": "matrix", "cells": [cell]}))
    assert main(["report", "in.json", "--out", "out"]) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_line_is_shown_and_not_obeyed():
    assert harmless("  ::add-mask::x") == "  : :add-mask::x"
    assert harmless("a ##[error]x") == "a ## [error]x"
    assert harmless("\x1b[2J\u202e") == "?[2J?"
    assert harmless("plain: text :: here") == "plain: text :: here"


def test_a_working_directory_that_is_gone_is_bad_input(tmp_path):
    (tmp_path / "gone").mkdir()
    line = f"cd gone && rmdir ../gone && {sys.executable} -m numerics_suite check --list"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (4, "")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", [["--help"], ["check", "--help"], ["matrix", "--help"]])
def test_help_in_the_c_locale(command):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "numerics_suite", *command], capture_output=True, check=False, env=environment
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_complex_numbers_are_counted_where_either_part_is_not_finite():
    values = torch.tensor([complex(1, 2), complex(float("nan"), 0), complex(0, float("inf"))])
    assert (nonfinite_count(values), nan_count(values)) == (2, 1)
    assert nonfinite_count(torch.tensor([1j])) == 0


def test_a_module_of_complex_numbers_is_not_finite_where_either_part_is_not():
    module = torch.nn.Module()
    module.sound = torch.nn.Parameter(torch.tensor([1 + 2j]))
    module.infinite = torch.nn.Parameter(torch.tensor([complex(float("-inf"), 0)]))
    module.register_buffer("table", torch.tensor([complex(0, float("nan"))]))
    assert not_finite(module) == ("infinite", "table")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize(
    "command",
    [
        ("report", "pipe", "--out", "out"),
        ("compare", "folder", "folder"),
        ("check", "--bundle", "folder"),
        ("check", "fixture:glm-tiny", "--list", "--data", "pipe"),
        ("check", "folder", "--list"),
    ],
)
def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path, capsys, command):
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder/bundle.json", "folder/config.json", "folder/kept.json"):
        os.mkfifo(tmp_path / name)
    assert main(command) == 4
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert command[-1] in err or command[1] in err


def test_a_pipe_that_somebody_writes_to_is_read(tmp_path, capsys):
    line = f"{sys.executable} -m numerics_suite report <(sleep 1; echo '[1]') --out out"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 4
    assert "/dev/fd/" in done.stderr
    assert "not JSON" not in done.stderr
