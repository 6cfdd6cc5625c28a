"""A report as a whole: every format of the same results, and a results file that survives its way through all of them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import jsonschema
import pytest
import xmlschema
from unit.sample_documents import HOSTILE, everything, hostile_run, run_of
from unit.sample_run import result, sample_run

from numerics_suite.core.errors import BadInputError
from numerics_suite.reports import report
from numerics_suite.reports.documents import CheckRun, Documents, read_documents
from numerics_suite.reports.github import annotation_lines
from numerics_suite.reports.lines import printable
from numerics_suite.reports.report import FILES, ensure_report, ensure_wanted, write_report, write_wanted
from numerics_suite.reports.results import dump, to_json, write_results
from numerics_suite.reports.summary import summary
from numerics_suite.reports.view.overview import verdict_of

SCHEMAS = Path(__file__).resolve().parents[1] / "schemas"


def of_run(run) -> Documents:
    return Documents(runs=(CheckRun(label="x", result=run),))


# --- numbers that are not finite, and texts that nobody expects ----------------------------------------------------------


@pytest.fixture(scope="module")
def survivor(tmp_path_factory) -> tuple[Documents, Path]:
    """The sample run with such numbers and texts: written, read back, and made a report of."""
    folder = tmp_path_factory.mktemp("survivor")
    write_results(folder / "out.json", hostile_run())
    documents = read_documents([folder / "out.json"])
    write_report(folder / "report", documents)
    return documents, folder / "report"


def test_the_results_file_gives_back_every_number_and_letter(survivor):
    (run,) = survivor[0].runs
    found = next(one for one in run.result.checks if one.check == "train.finite" and one.cell.precision == "fp16")
    assert math.isnan(found.measurements["non-finite"])
    assert found.measurements["last-loss"] == -math.inf
    assert found.finding.evidence["allowed"] == -math.inf
    assert found.finding.title == f"title {HOSTILE}"
    assert dump(to_json(run.result)) == dump(to_json(hostile_run()))


def test_junit_tells_them_in_words(survivor):
    text = (survivor[1] / "junit.xml").read_text(encoding="utf-8")
    xmlschema.XMLSchema(SCHEMAS / "junit-10.xsd").validate(text)
    assert "non-finite = NaN" in text
    assert "last-loss = -Infinity" in text
    assert "Infinity parameters; none is allowed" in text


def test_sarif_tells_them_in_words(survivor):
    log = json.loads((survivor[1] / "results.sarif").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    schema = json.loads((SCHEMAS / "sarif-2.1.0-rtm.5.json").read_text(encoding="utf-8"))
    jsonschema.Draft4Validator(schema).validate(log)
    found = [one["properties"]["evidence"] for one in log["runs"][0]["results"]]
    assert {one.get("measured") for one in found} >= {"NaN", "Infinity"}
    assert "-Infinity" in {one.get("allowed") for one in found}


@pytest.mark.parametrize("name", ["summary.md", "comment.md", "index.html"])
def test_markdown_and_html_tell_them_in_words(survivor, name):
    text = (survivor[1] / name).read_text(encoding="utf-8")
    assert "NaN tensors; none is allowed" in text
    assert "Infinity parameters; none is allowed" in text
    assert "at most -Infinity" in text
    assert "<script>alert(1)</script>" not in text
    assert "\x1b" not in text


def test_terminal_and_annotations_tell_them_in_words(survivor):
    (run,) = survivor[0].runs
    lines = "\n".join(line.text for line in summary(run.result, verbose=True))
    assert "NaN tensors; none is allowed" in lines
    assert "Infinity parameters; none is allowed" in lines
    assert "\x1b" not in lines
    told = annotation_lines(survivor[0])
    assert all(line.startswith("::") and "\x1b" not in line for line in told)
    assert " ".join(printable(HOSTILE).split()) in " ".join(lines.split())


# --- the folder --------------------------------------------------------------------------------------------------------


def test_every_file_is_written_and_the_same_again(tmp_path):
    written = write_report(tmp_path / "new" / "report", everything())
    assert [path.name for path in written] == list(FILES)
    assert sorted(path.name for path in (tmp_path / "new" / "report").iterdir()) == sorted(FILES)
    first = {path: path.read_bytes() for path in written}
    write_report(tmp_path / "new" / "report", everything())
    assert {path: path.read_bytes() for path in written} == first


def test_other_files_stay_and_ours_are_replaced(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "junit.xml").write_text("old")
    write_report(tmp_path, of_run(sample_run()))
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert (tmp_path / "junit.xml").read_text().startswith("<?xml")


def test_what_cannot_be_written_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ensure_report(tmp_path / "a" / "b", "--report")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "junit.xml").mkdir(parents=True)
    for place, why in (
        ("file", "it is a file"),
        ("file/report", "Not a directory"),
        ("folder", "it is a folder"),
        ("x" * 300, "File name too long"),
    ):
        with pytest.raises(BadInputError, match=rf"^--report: cannot write .*: {why}"):
            ensure_report(Path(place), "--report")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["junit.xml"]


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else True, reason="root may write everywhere")
def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(BadInputError, match="Permission denied"):
        ensure_report(tmp_path / "report", "--report")
    tmp_path.chmod(0o700)


def test_a_file_that_fails_leaves_no_half(tmp_path, monkeypatch):
    (tmp_path / "junit.xml").write_text("old")
    monkeypatch.setattr(report, "sarif_text", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(tmp_path, of_run(sample_run()))
    assert [path.name for path in tmp_path.iterdir()] == ["junit.xml"]
    assert (tmp_path / "junit.xml").read_text() == "old"


def test_a_junit_file_alone(tmp_path):
    documents = of_run(sample_run())
    ensure_wanted(None, tmp_path / "j.xml")
    write_wanted(documents, None, tmp_path / "j.xml")
    write_report(tmp_path / "report", documents)
    assert (tmp_path / "j.xml").read_bytes() == (tmp_path / "report" / "junit.xml").read_bytes()
    with pytest.raises(BadInputError, match=r"^--numerics-junitxml: cannot write"):
        ensure_wanted(None, tmp_path, "--numerics-")


@pytest.mark.parametrize(
    ("documents", "verdict"),
    [
        (of_run(sample_run()), "fail"),
        (of_run(run_of(result("load.config", "fp32"))), "pass"),
        (of_run(run_of(result("load.config", "fp32", status="error", reason="x"))), "error"),
        (of_run(run_of(result("load.config", "fp32"), exit_status=5)), "incomplete"),
        (Documents(), "empty"),
    ],
)
def test_the_verdict_is_the_worst(documents, verdict):
    assert verdict_of(documents) == verdict
