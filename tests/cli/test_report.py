"""`numerics-suite report`, and `--report` of the commands that run something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from unit import fake_versions
from unit.sample_baseline import baseline, with_bits
from unit.sample_documents import run_of, uninitialised
from unit.sample_run import result, sample_run
from unit.test_documents import matrix_in

from numerics_suite.baselines.store import save
from numerics_suite.cli import check
from numerics_suite.cli.main import main
from numerics_suite.reports.report import FILES
from numerics_suite.reports.results import write_results

FEW = ("fixture:glm4-tiny", "--precision", "fp32", "--attn", "sdpa", "--checks", "load.config", "-n", "0")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NUMERICS_SUITE_DEBUG", raising=False)
    return tmp_path


def ended(capsys, *arguments: str) -> tuple[int, str, str]:
    status = main(list(arguments))
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def results(folder) -> str:
    write_results(folder / "out.json", sample_run())
    return "out.json"


# --- report ------------------------------------------------------------------------------------------------------------


def test_a_report_is_written_and_named(capsys, results):
    status, out, err = ended(capsys, "report", results, "--out", "a/b")
    assert (status, err) == (0, "")
    assert out.splitlines() == [f"a/b/{name}" for name in FILES]
    assert all((Path("a/b") / name).stat().st_size for name in FILES)


def test_the_answer_as_json(capsys, results):
    status, out, err = ended(capsys, "report", results, "--out", "r", "--json", "-")
    assert (status, err) == (0, "")
    assert json.loads(out) == {
        "schema_version": 1,
        "command": "report",
        "complete": True,
        "verdict": "fail",
        "files": [f"r/{name}" for name in FILES],
        "notes": [],
    }


def test_quiet_prints_nothing(capsys, results):
    assert ended(capsys, "report", results, "--out", "r", "--quiet") == (0, "", "")


def test_against_earlier_results_the_comment_tells_what_changed(capsys, results):
    write_results(Path("old.json"), run_of(result("load.config", "fp32")))
    assert ended(capsys, "report", results, "--out", "r", "--against", "old.json", "--quiet")[0] == 0
    assert "**3 new findings**" in Path("r/comment.md").read_text(encoding="utf-8")
    assert ended(capsys, "report", results, "--out", "r", "--against", results, "--quiet")[0] == 0
    assert "Nothing changed against the earlier results." in Path("r/comment.md").read_text(encoding="utf-8")


def test_a_folder_stands_for_the_results_in_it(capsys, folder):
    (folder / "kept").mkdir()
    matrix_in(folder / "kept")
    (folder / "kept" / "package.json").write_text('{"name": "x"}')
    (folder / "kept" / "broken.json").write_text("{")
    status, out, _ = ended(capsys, "report", "kept", "--out", "r")
    assert status == 0
    assert "note: transformers 5.9.0: cells/gone.json is gone" in out
    assert "5.8.1" in Path("r/summary.md").read_text(encoding="utf-8")


def test_a_folder_of_folders_stands_for_their_results(capsys, folder):
    for name, run in (("one", sample_run()), ("two", run_of(uninitialised("x")))):
        (folder / "kept" / name).mkdir(parents=True)
        write_results(folder / "kept" / name / "results.json", run)
        (folder / "kept" / name / "job.json").write_text("{}")
    status, _, _ = ended(capsys, "report", "kept", "kept/one/results.json", "--out", "r")
    assert status == 0
    text = Path("r/junit.xml").read_text(encoding="utf-8")
    assert '<testsuite name="one/results: glm4-tiny-classifier"' in text
    assert '<testsuite name="two/results: glm4-tiny-classifier"' in text
    assert text.count("<testsuite ") == 2


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "report: no RESULTS given; a file that --json wrote, or a folder of them"),
        (["out.json"], "report: --out DIR is missing"),
        (["gone.json", "--out", "r"], "cannot read gone.json: No such file or directory"),
        (
            ["text.json", "--out", "r"],
            "text.json: not JSON (Expecting value: line 1 column 1 (char 0)); give a file that --json wrote",
        ),
        (["other.json", "--out", "r"], "other.json: a results file of schema_version None; this release reads 1"),
        (["empty", "--out", "r"], "empty: no results file in this folder; give a file that --json wrote"),
        (["out.json", "--out", "text.json"], "--out: cannot write text.json: it is a file"),
        (["out.json", "--out", "text.json/r"], "--out: cannot write text.json/r: Not a directory"),
        (["out.json", "--out", "r", "--against", "gone.json"], "cannot read gone.json: No such file or directory"),
        (["out.json", "--out", "r", "--json", "no/x.json"], "--json: cannot write no/x.json: no folder {here}/no"),
        (["out.json", "--out", "r", "--agianst", "x"], "unknown option '--agianst'; did you mean '--against'?"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, results, folder, arguments, line):
    (folder / "text.json").write_text("not json")
    (folder / "other.json").write_text("{}")
    (folder / "empty").mkdir()
    before = sorted(folder.rglob("*"))
    assert ended(capsys, "report", *arguments) == (4, "", f"numerics-suite: error: {line.format(here=folder)}\n")
    assert sorted(folder.rglob("*")) == before


# --- GitHub Actions ----------------------------------------------------------------------------------------------------


@pytest.fixture
def step(folder, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(folder / "step.md"))
    return folder / "step.md"


@pytest.mark.parametrize(("more", "annotated"), [([], True), (["--quiet"], False), (["--json", "-"], False)])
def test_a_step_is_annotated_unless_its_output_is_the_users(capsys, results, step, more, annotated):
    status, out, _ = ended(capsys, "report", results, "--out", "r", *more)
    assert status == 0
    assert ("\n::error title=" in out) is annotated
    assert "## numerics-suite: FAIL" in step.read_text(encoding="utf-8")
    if more[:1] == ["--json"]:
        json.loads(out)


def test_check_tells_the_step(capsys, step):
    status, out, _ = ended(capsys, "check", *FEW)
    assert status == 0
    assert "::error" not in out
    assert step.read_text(encoding="utf-8").startswith("\n## numerics-suite: PASS\n")


# --- --report ----------------------------------------------------------------------------------------------------------


def test_check_writes_what_report_would(capsys):
    status, out, err = ended(capsys, "check", *FEW, "--report", "r", "--json", "out.json", "--junitxml", "j.xml")
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "report: r/index.html"
    assert main(["report", "out.json", "--out", "again", "--quiet"]) == 0
    for name in FILES:
        assert (Path("r") / name).read_bytes() == (Path("again") / name).read_bytes(), name
    assert Path("j.xml").read_bytes() == Path("r/junit.xml").read_bytes()


def test_check_keeps_standard_output_for_json(capsys):
    status, out, _ = ended(capsys, "check", *FEW, "--report", "r", "--json", "-")
    assert status == 0
    assert json.loads(out)["verdict"] == "pass"
    assert Path("r/index.html").is_file()


@pytest.mark.parametrize("command", ["check", "matrix", "bisect", "compare"])
def test_an_unwritable_folder_is_refused_before_the_run(capsys, folder, command, monkeypatch):
    monkeypatch.setattr(check, "_check", lambda _, **_kept: pytest.fail("the run began"))
    (folder / "file").write_text("x")
    more = {
        "matrix": ["--transformers", "5.8.0"],
        "bisect": ["x", "--good", "5.7.0", "--bad", "5.8.0"],
        "compare": ["a", "b"],
    }
    status, out, err = ended(capsys, command, *more.get(command, []), "--report", "file/r")
    assert (status, out) == (4, "")
    assert err == "numerics-suite: error: --report: cannot write file/r: Not a directory\n"
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_the_key_of_pyproject_is_a_folder_beside_it(capsys, folder):
    (folder / "pyproject.toml").write_text('[tool.numerics-suite]\nreport = "numerics-report"\n', encoding="utf-8")
    assert ended(capsys, "check", *FEW, "--quiet")[0] == 0
    assert (folder / "numerics-report" / "index.html").is_file()


def test_a_report_that_cannot_be_written_at_the_end_is_said(capsys, folder, monkeypatch):
    from numerics_suite.reports import report

    monkeypatch.setattr(report, "ensure_report", lambda *_: None)
    (folder / "file").write_text("x")
    status, out, err = ended(capsys, "check", *FEW, "--report", "file/r")
    assert status == 4
    assert "PASS (exit 0)" in out
    assert err == "numerics-suite: error: --report: cannot write file/r: Not a directory\n"


def test_compare_writes_a_report(capsys):
    save(Path("old"), [baseline()], force=False)
    save(Path("new"), [with_bits(baseline(), logits="other", cell="other")], force=False)
    status, out, _ = ended(capsys, "compare", "old", "new", "--report", "r", "--json", "c.json")
    assert status == 0
    assert out.splitlines()[-1] == "report: r/index.html"
    assert "| **rounding** |" in Path("r/summary.md").read_text(encoding="utf-8")
    assert main(["report", "c.json", "--out", "again", "--quiet"]) == 0
    assert Path("again/summary.md").read_bytes() == Path("r/summary.md").read_bytes()


@pytest.fixture
def world(folder, monkeypatch):
    releases = ["5.0.0", "5.1.0", "5.2.0"]
    entries = {"releases": releases, "5.1.0": {"failed": ["load.head-init"]}, "5.2.0": {"failed": ["load.head-init"]}}
    (folder / "world.json").write_text(json.dumps(entries), encoding="utf-8")
    monkeypatch.setenv("NUMERICS_SUITE_CACHE", str(folder / "cache"))
    fake_versions.install(folder / "world.json", monkeypatch.setattr, releases)


def test_matrix_writes_a_report_and_its_folder_makes_the_same(capsys, world, folder):
    asked = ["fixture:glm4-tiny", "--transformers", ">=5.0", "--jobs", "2"]
    status, out, _ = ended(capsys, "matrix", *asked, "--report", "r", "--junitxml", "j.xml")
    assert status == 1
    assert out.splitlines()[-1] == "report: r/index.html"
    summary = Path("r/summary.md").read_text(encoding="utf-8")
    assert "**In transformers 5.1.0 to 5.2.0: " in summary
    assert "| `5.1.0 … 5.2.0` | **failed** | `load.head-init` |" in summary
    assert Path("j.xml").read_bytes() == Path("r/junit.xml").read_bytes()
    assert main(["report", ".numerics/matrix", "--out", "again", "--quiet"]) == 0
    for name in FILES:
        assert (Path("again") / name).read_bytes() == (Path("r") / name).read_bytes(), name
    # Moved, as an artifact of CI is: what is in the folder is found in its new place.
    (folder / ".numerics" / "matrix").rename(folder / "elsewhere")
    capsys.readouterr()
    status, out, _ = ended(capsys, "report", "elsewhere", "--out", "moved")
    assert (status, "note:" in out) == (0, False)
    assert Path("moved/junit.xml").read_bytes() == Path("r/junit.xml").read_bytes()


def test_bisect_writes_a_report(capsys, world):
    ends = ["--good", "5.0.0", "--bad", "5.2.0", "--jobs", "2"]
    status, _, err = ended(capsys, "bisect", "fixture:glm4-tiny", *ends, "--report", "r", "--json", "b.json")
    assert (status, err) == (0, "")
    summary = Path("r/summary.md").read_text(encoding="utf-8")
    assert "- **first bad** 5.1.0" in summary
    assert main(["report", "b.json", "--out", "again", "--quiet"]) == 0
    assert Path("again/summary.md").read_text(encoding="utf-8") == summary


@pytest.mark.slow
def test_plain_pytest_writes_the_same(folder):
    options = [
        f"--numerics-{word}"
        for word in ("precision=fp32", "attn=sdpa", "checks=load.config", "subject=fixture:glm4-tiny")
    ]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--pyargs",
        "numerics_suite.suite",
        *options,
    ]
    more = [
        "--numerics-report",
        "r",
        "--numerics-json",
        "out.json",
        "--numerics-junitxml",
        "j.xml",
        "--junitxml",
        "pytest.xml",
    ]
    run = subprocess.run([*command, *more], capture_output=True, text=True, check=False, cwd=folder)
    assert run.returncode == 0, run.stdout + run.stderr
    assert main(["report", "out.json", "--out", "again", "--quiet"]) == 0
    for name in FILES:
        assert (Path("r") / name).read_bytes() == (Path("again") / name).read_bytes(), name
    assert Path("j.xml").read_bytes() == Path("r/junit.xml").read_bytes()
    # pytest's own option stays pytest's.
    assert 'testsuite name="pytest"' in Path("pytest.xml").read_text(encoding="utf-8")
    (folder / "file").write_text("x")
    refused = subprocess.run(
        [*command, "--numerics-report", "file"], capture_output=True, text=True, check=False, cwd=folder
    )
    assert refused.returncode == 4
    assert "--numerics-report: cannot write file: it is a file" in refused.stderr
