"""Annotations and the summary of a step: in the words that the runner takes, within what it shows, and only there."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from unit.sample_documents import HOSTILE, everything, hostile_finding, matrix_document, run_of, uninitialised
from unit.sample_run import finding, result, sample_run

from numerics_suite.reports import github
from numerics_suite.reports.documents import CheckRun, Documents
from numerics_suite.reports.github import annotation_lines, tell_github

COMMAND = re.compile(r"::(error|notice) ((?:[a-z]+=[^:,\r\n]*)(?:,[a-z]+=[^:,\r\n]*)*)::([^\r\n]*)")


def of_run(run) -> Documents:
    return Documents(runs=(CheckRun(label="x", result=run),))


def read(line: str) -> tuple[str, dict[str, str], str]:
    """A line as the runner reads it."""
    found = COMMAND.fullmatch(line)
    assert found, line
    facts = dict(part.split("=", 1) for part in found[2].split(","))

    def plain(value: str) -> str:
        for code, letter in (("%0D", "\r"), ("%0A", "\n"), ("%3A", ":"), ("%2C", ","), ("%25", "%")):
            value = value.replace(code, letter)
        return value

    return found[1], {name: plain(value) for name, value in facts.items()}, plain(found[3])


WHY = "no code writes to the memory of score.weight, so it holds whatever was there before: NaN in one process, zeros in another (uninitialised-parameters)."


@pytest.fixture
def step(tmp_path, monkeypatch):
    """A step of GitHub Actions in an empty repository."""
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    return tmp_path


def test_a_finding_says_what_where_in_which_version_and_what_to_do(step):
    (lost, told) = sorted(
        map(read, annotation_lines(Documents(matrices=(matrix_document(),)))), key=lambda one: one[1]["title"]
    )
    assert told[:2] == ("error", {"title": f"No code initialised score.weight of 5.8.0: {WHY}"})
    assert told[2].split("\n") == [
        "load.head-init on glm4-tiny-classifier · bf16 · sdpa · cpu · 5.8.0 and 5.8.1",
        "where: score.weight; modeling_glm4.py:123",
        "versions: first bad transformers 5.8.0; last good transformers 5.7.0; good again transformers 5.9.0",
        "fix: use transformers 5.9.0 or newer, or stay with transformers 5.7.0; leave out 5.8.0 to 5.8.1 -- tried, works",
        "fix: initialise the head by hand -- tried, works: finite",
    ]
    assert lost[1]["title"] == "Could not be carried out: 5.11.0"


def test_a_line_of_the_repository_is_annotated(step):
    (step / "src").mkdir()
    (step / "src" / "my, model.py").write_text("")
    (step / "src" / "mine.py").write_text("")
    failed = uninitialised("x")
    (line,) = annotation_lines(of_run(run_of(replace(failed, finding=replace(failed.finding, source="mine.py:12")))))
    assert read(line)[1] == {
        "file": "src/mine.py",
        "line": "12",
        "title": f"No code initialised score.weight of x: {WHY}",
    }


def test_a_line_of_transformers_has_no_file(step):
    (line,) = annotation_lines(of_run(run_of(uninitialised("x"))))
    assert "modeling_glm4.py:123" in read(line)[2]
    assert "file=" not in line


def test_nothing_in_a_text_is_a_command(step):
    lines = annotation_lines(everything())
    assert all(COMMAND.fullmatch(line) for line in lines)
    hostile = replace(uninitialised("x"), finding=hostile_finding(title="50% of a,b:c\n::error::x"))
    (line,) = annotation_lines(of_run(run_of(hostile)))
    assert read(line)[1]["title"].startswith("50% of a,b:c ::error::x")
    assert line.startswith("::error title=50%25 of a%2Cb%3Ac %3A%3Aerror%3A%3Ax")


def test_the_worst_ten_are_shown_and_the_rest_is_counted(step):
    run = run_of(
        result("train.amp", "bf16", status="error", reason="out of memory"),
        *(
            result(f"load.c{at}", "bf16", status="failed", finding=finding("unknown", f"finding {at}"))
            for at in range(12)
        ),
    )
    told = [read(line) for line in annotation_lines(of_run(run))]
    assert [kind for kind, _, _ in told] == ["error"] * 10 + ["notice"]
    assert [facts["title"] for _, facts, _ in told[:2]] == [
        f"Finding {at}: no experiment identified the cause (unknown)." for at in range(2)
    ]
    assert told[-1][2] == "3 more problems; all of them are in the summary of this step"


def test_accepted_findings_are_no_errors(step):
    run = run_of(result("train.clip", "bf16", status="accepted", reason="known", finding=finding("divergence", "x")))
    assert annotation_lines(of_run(run)) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"verdict": "fail", "exit_status": 1, "notes": ("accept entry matched nothing",)},
            "accept entry matched nothing",
        ),
        ({"exit_status": 5}, "exit status 5"),
    ],
)
def test_a_run_that_fails_without_a_failing_check_is_told(step, changes, text):
    (line,) = annotation_lines(of_run(run_of(result("load.config", "fp32"), **changes)))
    assert read(line)[1:] == ({"title": "The run does not pass"}, text)


def test_a_pass_is_silent(step):
    assert annotation_lines(of_run(run_of(result("load.config", "fp32")))) == []


# --- when and where ----------------------------------------------------------------------------------------------------


def test_a_step_gets_both(step):
    stream = io.StringIO()
    tell_github(of_run(sample_run()), stream)
    assert len(stream.getvalue().splitlines()) == 4
    assert "## numerics-suite: FAIL" in (step / "summary.md").read_text(encoding="utf-8")


def test_without_a_stream_the_summary_alone_is_written(step, capsys):
    tell_github(of_run(sample_run()), None)
    assert "## numerics-suite: FAIL" in (step / "summary.md").read_text(encoding="utf-8")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("value", [None, "false", "1"])
def test_elsewhere_nothing_happens(step, monkeypatch, value):
    monkeypatch.delenv("GITHUB_ACTIONS")
    if value is not None:
        monkeypatch.setenv("GITHUB_ACTIONS", value)
    stream = io.StringIO()
    tell_github(of_run(sample_run()), stream)
    assert stream.getvalue() == ""
    assert not (step / "summary.md").exists()


def test_what_the_step_wrote_before_stays(step):
    (step / "summary.md").write_text("# mine\n", encoding="utf-8")
    tell_github(of_run(sample_run()), None)
    tell_github(of_run(run_of(result("load.config", "fp32"))), None)
    told = (step / "summary.md").read_text(encoding="utf-8")
    assert told.startswith("# mine\n\n## numerics-suite: FAIL")
    assert told.count("## numerics-suite: ") == 2


def test_the_whole_summary_keeps_within_what_github_shows(step):
    (step / "summary.md").write_text("x" * (github.LARGEST_SUMMARY - 3_000), encoding="utf-8")
    tell_github(of_run(sample_run()), None)
    told = (step / "summary.md").read_bytes()
    assert len(told) <= github.LARGEST_SUMMARY
    assert b"more than there is room for" in told
    (step / "summary.md").write_text("x" * (github.LARGEST_SUMMARY - 100), encoding="utf-8")
    tell_github(of_run(sample_run()), None)
    assert (step / "summary.md").stat().st_size == github.LARGEST_SUMMARY - 100


def test_a_summary_that_cannot_be_written_ends_nothing(step, monkeypatch, capsys):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step / "no" / "summary.md"))
    tell_github(of_run(sample_run()), None)
    assert (
        capsys.readouterr().err
        == "numerics-suite: the summary of this step cannot be written: No such file or directory\n"
    )


def test_a_long_text_is_cut(step):
    hostile = replace(uninitialised("x"), finding=hostile_finding(title="t" * 5000, module="m" * 5000))
    (line,) = annotation_lines(of_run(run_of(hostile)))
    _, facts, text = read(line)
    assert (len(facts["title"]), len(text)) == (200, github.LONGEST)
    assert HOSTILE not in line
