"""The action, and the workflows that a project copies: valid, safe, and what they run is run here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from preloaded import python
from unit.sample_documents import run_of, uninitialised
from unit.sample_run import result

from numerics_suite.cli.main import COMMANDS, main
from numerics_suite.reports.comment import MARKER
from numerics_suite.reports.report import FILES
from numerics_suite.reports.results import write_results
from numerics_suite.settings.table import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
ACTION = ROOT / "action.yml"
EXAMPLES = ROOT / "docs" / "examples"
FILES_OF_CI = {
    ACTION: "vendor.github-actions",
    EXAMPLES / "github-gate.yml": "vendor.github-workflows",
    EXAMPLES / "github-gpu.yml": "vendor.github-workflows",
    EXAMPLES / "gitlab-ci.yml": "vendor.gitlab-ci",
}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash, as every runner has")


def loaded(path: Path) -> dict:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def scripts(path: Path) -> list[str]:
    """Every text that a shell runs."""
    content = loaded(path)
    if path == ACTION:
        return [step["run"] for step in content["runs"]["steps"] if "run" in step]
    if path.name == "gitlab-ci.yml":
        return ["\n".join(job["script"]) for job in content.values()]
    return [step["run"] for job in content["jobs"].values() for step in job["steps"] if "run" in step]


def valid(path: Path, schema: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(path)]
    if schema == "vendor.gitlab-ci":
        command += ["--data-transform", "gitlab-ci"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("path", "schema"), FILES_OF_CI.items(), ids=[path.name for path in FILES_OF_CI])
def test_a_file_is_valid(path, schema):
    run = valid(path, schema)
    assert run.returncode == 0, run.stdout + run.stderr


def test_an_invalid_file_is_seen(tmp_path):
    wrong = tmp_path / "action.yml"
    wrong.write_text(
        ACTION.read_text(encoding="utf-8").replace("using: composite", "using: composit"), encoding="utf-8"
    )
    assert valid(wrong, "vendor.github-actions").returncode == 1


@pytest.mark.parametrize("path", FILES_OF_CI, ids=[path.name for path in FILES_OF_CI])
def test_what_a_shell_runs_is_a_script_and_takes_no_text_of_the_event(path):
    told = scripts(path)
    assert told
    for script in told:
        assert "${{" not in script, "an expression becomes code here: hand it over as a variable"
        run = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("path", FILES_OF_CI, ids=[path.name for path in FILES_OF_CI])
def test_commands_and_options_are_ours(path):
    known = {flag for option in OPTIONS for flag in option.flags} | {"--transformers", "--out", "--against"}
    twins = {option.twin for option in OPTIONS}
    for script in scripts(path):
        for line in script.replace("\\\n", " ").splitlines():
            words = line.split()
            if "numerics-suite" in words[:1]:
                assert words[1] in COMMANDS
                assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known
            assert {word.partition("=")[0] for word in words if word.startswith("--numerics-")} <= twins


def test_the_examples_use_the_action_as_it_is():
    inputs = loaded(ACTION)["inputs"]
    jobs = loaded(EXAMPLES / "github-gate.yml")["jobs"]
    used = [step for job in jobs.values() for step in job["steps"] if "numerics-suite@" in step.get("uses", "")]
    assert len(used) == 2
    for step in used:
        assert set(step["with"]) <= set(inputs)


# --- the action's steps, run as a runner would ---------------------------------------------------------------------------


class Step:
    """One step of the action in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.summary = folder, folder / "output", folder / "step.md"
        self.output.touch()

    def run(self, name: str, path: str = "", **given: str) -> subprocess.CompletedProcess[str]:
        """Run it with these inputs; what else its expressions say is in upper case."""
        content = loaded(ACTION)
        (step,) = [step for step in content["runs"]["steps"] if step.get("name") == name]
        assert step["shell"] == "bash"
        inputs = {key: str(value.get("default", "")) for key, value in content["inputs"].items()}
        values = {**{f"inputs.{key}": value for key, value in inputs.items()}, **given}
        environment = {
            **os.environ,
            **{key: values[value.removeprefix("${{ ").removesuffix(" }}")] for key, value in step["env"].items()},
            "GITHUB_ACTIONS": "true",
            "GITHUB_OUTPUT": str(self.output),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": os.pathsep.join([path, str(Path(python()).parent), os.environ["PATH"]]).lstrip(os.pathsep),
        }
        (self.folder / "step.sh").write_text(step["run"], encoding="utf-8")
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "step.sh"]  # as the runner does
        return subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)

    def program(self, name: str, script: str) -> str:
        """A program of that name which notes what it is called with; the folder to look for it in."""
        place = self.folder / "bin" / name
        place.parent.mkdir(exist_ok=True)
        notes = f"printf '%s\\037' \"$@\" >> '{self.folder}/calls'; printf '\\n' >> '{self.folder}/calls'"
        place.write_text(f"#!/usr/bin/env bash\n{notes}\n{script}\n", encoding="utf-8")
        place.chmod(0o755)
        return str(place.parent)

    def calls(self) -> list[list[str]]:
        """What it was called with."""
        text = (self.folder / "calls").read_text(encoding="utf-8")
        return [line.split("\x1f")[:-1] for line in text.split("\n")[:-1]]


@pytest.fixture
def step(tmp_path):
    return Step(tmp_path)


def test_the_check_step_passes_and_tells_the_step(step):
    write_results(step.folder / "old.json", run_of(result("load.config", "fp32")))
    run = step.run(
        "Check",
        **{
            "inputs.subject": "fixture:glm4-tiny",
            "inputs.precision": "fp32",
            "inputs.args": "--attn sdpa --checks 'load.config'\n-n 0",
            "inputs.against": "old.json",
        },
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "PASS (exit 0)" in run.stdout
    assert step.output.read_text() == "status=0\nsarif=numerics-report/results.sarif\n"
    report = step.folder / "numerics-report"
    assert sorted(path.name for path in report.iterdir()) == sorted([*FILES, "results.json"])
    assert json.loads((report / "results.json").read_text())["settings"]["precision"] == ["fp32"]
    assert step.summary.read_text(encoding="utf-8").count("## numerics-suite: PASS") == 1
    assert "no new finding" in (report / "comment.md").read_text(encoding="utf-8")


def test_the_check_step_fails_as_the_command_does(step):
    run = step.run("Check", **{"inputs.subject": "./no-such-checkpoint", "inputs.transformers": ""})
    assert run.returncode == 4
    assert step.output.read_text() == "status=4\n"
    assert "no-such-checkpoint" in run.stderr


def test_inputs_are_words_and_never_code(step):
    hostile = "a; touch pwned $(touch pwned) `touch pwned`"
    path = step.program("python", "exit 1")
    run = step.run(
        "Check",
        path,
        **{
            "inputs.subject": f"./one './two words' {hostile}",
            "inputs.task": hostile,
            "inputs.transformers": "latest:3",
            "inputs.baseline": "my baselines",
            "inputs.args": "--name \"x y\" ''",
        },
    )
    assert run.returncode == 1
    (call,) = step.calls()
    assert call == [
        "-m", "numerics_suite", "matrix", "./one", "./two words", "a;", "touch", "pwned", "$(touch", "pwned)", "`touch", "pwned`",
        "--transformers=latest:3", f"--task={hostile}", "--baseline=my baselines", "--name", "x y",
        "--report=numerics-report", "--json=numerics-report/results.json",
    ]  # fmt: skip
    assert not (step.folder / "pwned").exists()


def test_a_quote_without_its_end_is_refused(step):
    path = step.program("python", "exit 0")
    run = step.run("Check", path, **{"inputs.args": "--name 'x"})
    assert run.returncode != 0
    assert "quote" in run.stderr
    assert not (step.folder / "calls").exists()


@pytest.mark.parametrize(
    ("given", "call"),
    [
        ({}, ["-m", "pip", "install", "/the action"]),
        (
            {"inputs.install": "numerics-suite==0.1.0 'torch>=2.6'"},
            ["-m", "pip", "install", "numerics-suite==0.1.0", "torch>=2.6"],
        ),
    ],
)
def test_the_install_step_takes_the_actions_own_package_or_what_is_asked(step, given, call):
    run = step.run(
        "Install numerics-suite", step.program("python", "exit 0"), **{"github.action_path": "/the action", **given}
    )
    assert run.returncode == 0, run.stderr
    assert step.calls() == [call]


PULL = {"github.repository": "me/mine", "github.event.pull_request.number": "7", "inputs.token": "secret"}


@pytest.mark.parametrize(
    ("comments", "wanted"),
    [
        ("", ["pr", "comment", "7", "--repo", "me/mine", "--body-file", "numerics-report/comment.md"]),
        (
            "https://host/me/mine/pull/7#issuecomment-41\nhttps://host/me/mine/pull/7#issuecomment-42",
            [
                "api",
                "--silent",
                "--method",
                "PATCH",
                "repos/me/mine/issues/comments/42",
                "--field",
                "body=@numerics-report/comment.md",
            ],
        ),
    ],
    ids=["first", "again"],
)
def test_the_comment_is_posted_once_and_written_over_after(step, comments, wanted):
    (step.folder / "numerics-report").mkdir()
    (step.folder / "numerics-report" / "comment.md").write_text(MARKER)
    path = step.program("gh", f"case \"$2\" in view) printf '%s' '{comments}' ;; esac")
    run = step.run("Comment on the pull request", path, **PULL)
    assert run.returncode == 0, run.stderr
    looked, posted = step.calls()
    assert looked[:5] == ["pr", "view", "7", "--repo", "me/mine"]
    assert posted == wanted
    assert "::notice::" not in run.stdout


def test_a_comment_is_looked_for_by_the_line_that_we_write():
    (script,) = [script for script in scripts(ACTION) if "gh pr view" in script]
    assert f'startswith("{MARKER}")' in script
    assert "viewerDidAuthor" in script


def test_a_token_that_may_only_read_is_said_and_fails_nothing(step):
    (step.folder / "numerics-report").mkdir()
    (step.folder / "numerics-report" / "comment.md").write_text(MARKER)
    run = step.run("Comment on the pull request", step.program("gh", "exit 1"), **PULL)
    assert run.returncode == 0
    assert run.stdout == "::notice::numerics-suite could not comment: the token needs pull-requests with write\n"


def test_without_a_report_there_is_no_comment(step):
    run = step.run("Comment on the pull request", step.program("gh", "exit 1"), **PULL)
    assert (run.returncode, run.stdout) == (0, "")
    assert not (step.folder / "calls").exists()


def test_the_comment_that_the_action_posts_is_of_the_results(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_results(tmp_path / "new.json", run_of(uninitialised("5.8.0")))
    write_results(tmp_path / "old.json", run_of(result("load.head-init", "bf16", "sdpa")))
    assert main(["report", "new.json", "--out", "r", "--against", "old.json", "--quiet"]) == 0
    told = (tmp_path / "r" / "comment.md").read_text(encoding="utf-8")
    assert told.startswith(f"{MARKER}\n## numerics-suite: FAIL\n\n**1 new finding**\n")
