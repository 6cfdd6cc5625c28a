"""The command line from outside: exit status, standard output and the one line on standard error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from preloaded import python

import numerics_suite
from numerics_suite.cli import check
from numerics_suite.cli.main import COMMANDS, main
from numerics_suite.core.errors import BadInputError, CheckError

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(numerics_suite.__file__).parents[1])}
"""Runs this very package, installed or not, in any folder."""

HEAVY = ("torch", "transformers", "numpy", "hypothesis", "rich", "pytest", "safetensors")


def command(
    *arguments: str, cwd: Path | None = None, program: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [program, "-m", "numerics_suite", *arguments],
        text=True, capture_output=True, check=False, cwd=cwd, timeout=120, env=ENVIRONMENT,
    )  # fmt: skip


def ended(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(arguments)
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NUMERICS_SUITE_DEBUG", raising=False)


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["fixtures", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    script = f"""
        import sys
        from numerics_suite.cli.main import main
        status = main({arguments!r})
        print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules)), status)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        text=True,
        capture_output=True,
        check=True,
        timeout=60,
        env=ENVIRONMENT,
    )
    assert done.stdout.splitlines()[-1] == "HEAVY [] 0"


def test_help_lists_every_command(capsys):
    status, out, err = ended(capsys, "--help")
    assert (status, err) == (0, "")
    assert all(f"  {name} " in out for name in COMMANDS)
    assert "examples:" in out


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_commands_help_has_examples_and_fits(capsys, name):
    status, out, err = ended(capsys, name, "--help")
    assert (status, err) == (0, "")
    assert f"  numerics-suite {name}" in out
    assert "--json FILE" in out
    assert "--quiet" in out
    assert max(len(line) for line in out.splitlines()) <= 80


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "no command given; see numerics-suite --help"),
        (["chek"], "unknown command 'chek'; did you mean 'check'?"),
        (["zzzz"], "unknown command 'zzzz' (see numerics-suite --help)"),
        (["--hlep"], "unknown option '--hlep'; did you mean '--help'?"),
        (["check", "--precison", "bf16"], "unknown option '--precison'; did you mean '--precision'?"),
        (["check", "--zzzz=1"], "unknown option '--zzzz' (see numerics-suite check --help)"),
        (["check", "--prec", "bf16"], "unknown option '--prec'; did you mean '--precision'?"),
        (["check", "--steps"], "--steps: expected one argument"),
        (["check", "--steps", "no"], "--steps: must be a whole number of at least 1, not 'no'"),
        (["check", "--bundle", "d"], "--bundle: d is no bundle of the watch: bundle.json: No such file or directory"),
        (["check", "--bundle", "d", "--report", "r"], "--report cannot go with --bundle, which asks one question"),
        (["check", "a", "--seed", "1", "b", "--name", "x", "--name", "y", "--name", "z"],
         "--name: 3 names for 2 subjects; give one per SUBJECT"),
        (["fixtures"], "fixtures: no action given (known: list, build, path)"),
        (["fixtures", "lst"], "unknown action 'lst'; did you mean 'list'? (known: list, build, path)"),
        (["fixtures", "list", "glm-tiny"], "list takes no names, and 'glm-tiny' was given"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_4(capsys, arguments, line):
    status, out, err = ended(capsys, *arguments)
    assert (status, out) == (4, "")
    assert err == f"numerics-suite: error: {line}\n"


@pytest.mark.parametrize("option", ["--json", "--junitxml"])
def test_an_unwritable_path_is_refused_before_the_run(capsys, tmp_path, option, monkeypatch):
    monkeypatch.setattr(check, "_check", lambda _, **_kept: pytest.fail("the run began"))
    status, out, err = ended(capsys, "check", option, "no/out")
    assert (status, out) == (4, "")
    assert err == f"numerics-suite: error: {option}: cannot write no/out: no folder {tmp_path}/no\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [
        (BadInputError("no such\nthing"), 4, "error: no such thing"),
        (CheckError("pytest ended"), 3, "internal error: pytest ended"),
        (KeyboardInterrupt(), 2, "interrupted"),
        (ZeroDivisionError("oops"), 3, "internal error: ZeroDivisionError: oops"),
        (
            ImportError("tokenizers<=0.23.0 is required, but found 0.23.3"),
            4,
            "error: the installed packages cannot be imported together (tokenizers<=0.23.0 is required, but found 0.23.3); "
            "`pip check` names what does not fit",
        ),
        (
            ModuleNotFoundError("No module named 'numerics_suite.gone'", name="numerics_suite.gone"),
            3,
            "internal error: ModuleNotFoundError: No module named 'numerics_suite.gone'",
        ),
        (OSError(28, "No space left on device", "/x"), 4, "error: cannot write /x: No space left on device"),
        (OSError(5, "Input/output error"), 3, "internal error: OSError: [Errno 5] Input/output error"),
    ],
)
def test_every_end_has_its_status_and_its_line(capsys, monkeypatch, raised, status, line):
    def fail(_settings, **_kept):
        raise raised

    monkeypatch.setattr(check, "_check", fail)
    monkeypatch.setattr("numerics_suite.reports.streams.os.dup2", lambda *_: None)
    assert ended(capsys, "check") == (status, "", f"numerics-suite: {line}\n")


def test_a_traceback_is_for_whoever_asks(capsys, monkeypatch):
    monkeypatch.setattr(check, "_check", lambda _, **_kept: 1 / 0)
    monkeypatch.setenv("NUMERICS_SUITE_DEBUG", "1")
    status, _, err = ended(capsys, "check")
    assert status == 3
    assert err.startswith("Traceback")
    assert err.endswith("numerics-suite: internal error: ZeroDivisionError: division by zero\n")


def test_options_reach_the_run_wherever_they_stand(monkeypatch):
    seen = []
    monkeypatch.setattr(check, "_check", lambda settings, **_kept: seen.append(settings) or 5)
    assert main(["check", "a", "--precision=bf16", "b", "-n", "2", "--no-diagnose", "--name", "x"]) == 5
    (settings,) = seen
    assert (settings.subjects, settings.names, settings.precision) == (("a", "b"), ("x",), ("bf16",))
    assert (settings.workers, settings.diagnose) == (2, False)


def test_a_reader_that_leaves_early_is_no_failure():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "numerics_suite", "check", "--help"],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False, timeout=60, env=ENVIRONMENT,
    )  # fmt: skip
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--help"], "cannot write standard output: No space left on device"),
        (["fixtures", "list"], "cannot write standard output: No space left on device"),
        (["fixtures", "list", "--json", "-"], "--json: cannot write to standard output: No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_and_exit_4(arguments, line):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        done = subprocess.run(
            [sys.executable, "-m", "numerics_suite", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60, env=ENVIRONMENT,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (4, f"numerics-suite: error: {line}\n")


def test_fixtures_list_and_path():
    listed = command("fixtures", "list", "--json", "-")
    assert (listed.returncode, listed.stderr) == (0, "")
    names = [row["name"] for row in json.loads(listed.stdout)["fixtures"]]
    assert {"glm-tiny", "glm4-tiny", "chatglm-tiny", "glm4-tiny-classifier"} <= set(names)
    found = command("fixtures", "path", "glm4-tiny", "glm-tiny")
    assert [Path(line).name for line in found.stdout.splitlines()] == ["glm4-tiny", "glm-tiny"]
    assert all((Path(line) / "config.json").is_file() for line in found.stdout.splitlines())


def test_fixtures_of_an_unknown_name():
    done = command("fixtures", "path", "glm4-tny")
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("numerics-suite: error: no fixture is named 'glm4-tny'; did you mean 'glm4-tiny'?")


def test_json_goes_to_its_file_and_the_answer_to_the_reader(tmp_path):
    done = command("fixtures", "path", "glm-tiny", "--json", str(tmp_path / "out.json"))
    written = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert written["fixtures"] == [{"name": "glm-tiny", "path": done.stdout.strip()}]


def test_list_prints_the_plan_and_runs_nothing():
    arguments = ("check", "fixture:glm-tiny", "--precision", "fp32,fp16", "--attn", "eager", "--list")
    done = command(*arguments, program=python())
    assert done.returncode == 0, done.stderr
    assert [line.split()[:3] for line in done.stdout.splitlines()[1:3]] == [
        ["glm-tiny", "fp32", "eager"],
        ["glm-tiny", "fp16", "eager"],
    ]
    written = json.loads(command(*arguments, "--json", "-", program=python()).stdout)
    assert [row["precision"] for row in written["planned"]] == ["fp32", "fp16"]
    assert all(row["bytes"] > 0 and row["checks"] > 0 for row in written["planned"])


def test_the_module_and_the_command_are_one():
    done = command("--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "numerics-suite")


def test_whatever_prints_to_standard_output_stays_out_of_the_json():
    script = """
        import os, subprocess, sys
        from numerics_suite.cli.output import only_json_on_stdout, write_json
        print("before")
        with only_json_on_stdout():
            print("python")
            os.write(1, b"library\\n")
            subprocess.run([sys.executable, "-c", "print('worker')"], check=True)
        write_json("-", {"answer": 1})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        text=True, capture_output=True, check=True, timeout=60, env=ENVIRONMENT,
    )  # fmt: skip
    assert done.stdout == 'before\n{\n "answer": 1\n}\n'
    assert sorted(done.stderr.split()) == ["library", "python", "worker"]


def test_start_up_is_quick():
    """A bound far above what it takes (0.1 s), so that a busy machine passes and an import of torch does not."""
    import time

    quickest = 9.0
    for _ in range(3):
        begun = time.perf_counter()
        command("--help")
        quickest = min(quickest, time.perf_counter() - begun)
    assert quickest < 0.8
