"""`numerics-suite init`: what it writes can be used as it stands, and nothing that was there is touched."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from preloaded import python

from numerics_suite.cli.main import main
from numerics_suite.settings.sources import read_pyproject
from numerics_suite.subjects.fixtures import fixture_path

FAST = ("fixture:glm4-tiny", "--precision", "fp32", "--attn", "sdpa")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below, by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def init(*arguments: str) -> int:
    return main(["init", *arguments])


def test_an_empty_repository_gets_all_of_it_and_a_second_run_changes_nothing(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert init(*FAST) == 0
    first = files_of(repository)
    assert {"pyproject.toml", ".numerics/.gitignore", ".github/workflows/numerics.yml"} < set(first)
    assert [name for name in first if name.startswith(".numerics/baselines/glm4-tiny")]
    assert "written      pyproject.toml" in capsys.readouterr().out
    assert init("fixture:glm-tiny", "--precision", "bf16") == 0
    assert files_of(repository) == first
    said = capsys.readouterr().out
    assert said.count("kept ") == 4
    assert "git add \n" not in said


def test_the_gate_that_was_written_passes(repository: Path) -> None:
    assert init(*FAST) == 0
    command = [
        python(),
        "-m",
        "numerics_suite",
        "check",
        "--checks",
        "baseline.*",
        "--json",
        "out.json",
        "-n",
        "0",
    ]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads((repository / "out.json").read_text())["checks"]
    assert {check["id"].partition("/")[2] for check in checks} == {"glm4-tiny/fp32/sdpa/cpu"}
    assert {check["status"] for check in checks} == {"passed"}


def test_a_pyproject_of_the_users_keeps_every_byte(repository: Path) -> None:
    held = '[project]\nname = "mine"  # a comment\n[tool.other]\nkey = "ü"'
    (repository / "pyproject.toml").write_text(held, encoding="utf-8")
    assert init(*FAST, "--no-baseline", "--task", "causal-lm", "--trust-remote-code") == 0
    text = (repository / "pyproject.toml").read_text(encoding="utf-8")
    assert text.startswith(held)
    values, _ = read_pyproject(repository / "pyproject.toml")
    assert values == {
        "subjects": ("fixture:glm4-tiny",),
        "task": "causal-lm",
        "precision": ("fp32",),
        "attn": ("sdpa",),
        "trust_remote_code": True,
    }
    assert "pip install . numerics-suite==" in (repository / ".github/workflows/numerics.yml").read_text()


def test_a_checkpoint_inside_the_repository_is_named_relative_to_it(repository: Path) -> None:
    (repository / "model").symlink_to(fixture_path("glm4-tiny"), target_is_directory=True)
    (repository / "requirements.txt").write_text("transformers\n")
    assert init(str(repository / "model"), "--precision", "bf16", "--no-baseline") == 0
    assert 'subjects = ["./model"]' in (repository / "pyproject.toml").read_text()
    assert (
        "pip install -r requirements.txt numerics-suite=="
        in (repository / ".github/workflows/numerics.yml").read_text()
    )


def test_without_a_subject_the_shipped_ones_and_the_precisions_of_this_device(repository: Path) -> None:
    assert init("--no-baseline") == 0
    values, _ = read_pyproject(repository / "pyproject.toml")
    assert values["subjects"] == ("fixture:glm4-tiny", "fixture:glm4-tiny-classifier")
    assert "bf16" in values["precision"]


@pytest.mark.parametrize("where", ["file", "remote", "asked"])
def test_gitlab_is_seen(repository: Path, where: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked: tuple[str, ...] = ()
    wanted = ".gitlab-ci.yml"
    if where == "file":
        (repository / ".gitlab-ci.yml").write_text("stages: [test]\n")
        wanted = ".gitlab/numerics.yml"
    elif where == "remote":
        (repository / ".git").mkdir()
        (repository / ".git" / "config").write_text('[remote "origin"]\n\turl = git@gitlab.example:a/b.git\n')
    else:
        asked = ("--ci", "gitlab")
    assert init(*FAST, "--no-baseline", *asked) == 0
    job = yaml.safe_load((repository / wanted).read_text())["numerics"]
    assert any("numerics-suite check" in line for line in job["script"])
    assert not (repository / ".github").exists()
    assert ("include: {local: /.gitlab/numerics.yml}" in " ".join(capsys.readouterr().out.split())) == (where == "file")


def test_the_github_workflow_is_one(repository: Path) -> None:
    assert init(*FAST, "--no-baseline", "--ci", "github") == 0
    workflow = yaml.safe_load((repository / ".github/workflows/numerics.yml").read_text())
    steps = workflow["jobs"]["gate"]["steps"]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    # No expression of GitHub's stands in a shell line, where a branch's name would be run.
    assert not [step for step in steps if "${{" in step.get("run", "")]
    assert workflow["permissions"] == {"contents": "read"}


def test_a_dry_run_writes_nothing(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert init(*FAST, "--dry-run", "--json", "-") == 0
    assert not files_of(repository)
    answer = json.loads(capsys.readouterr().out)
    assert [piece["state"] for piece in answer["files"]] == ["written"] * 3
    assert answer["dry_run"] is True


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such-folder",), "no-such-folder"),
        (("--ci", "jenkins"), "--ci"),
        (("--precision", "bf17"), "bf17"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    repository: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert init(*arguments) == 4
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not files_of(repository)


def test_a_broken_pyproject_is_named(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / "pyproject.toml").write_text("[project\n")
    assert init(*FAST, "--no-baseline") == 4
    assert "pyproject.toml: not valid TOML" in capsys.readouterr().err
    assert set(files_of(repository)) == {"pyproject.toml"}
